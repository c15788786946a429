"""`python -m pipeline.serve ARTIFACT [host] [port]`: the process that serves; `python -m pipeline serve` starts it.

The port is taken before the engine is loaded, so a port in use is known at once; requests are accepted only after the golden scores
were reproduced. SIGTERM and Ctrl-C finish what is in flight.
"""

from __future__ import annotations

import errno
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import AutotuneError, UserError

USAGE = "python -m pipeline serve ARTIFACT [HOST] [PORT]"
DRAIN_S = 10


def serve(path: Path, host: str = "127.0.0.1", port: int = 8000) -> int:
    """Serve an artifact until told to stop; port 0 takes a free one. Raises UserError: a bad artifact, or a port that cannot be had."""
    taken = listen(host, port)
    try:
        _serve_on(taken, path)
    finally:
        taken.close()
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises UserError where the port is in use or not ours to take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        # Listening at once is what makes the port ours; callers wait in the backlog until the engine is proved.
        taken.listen()
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} on {host} is in use by another program; choose another: {USAGE.replace('PORT', str(port + 1))}") from error
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror or error}; usage: {USAGE}") from error
    except OverflowError as error:
        taken.close()
        raise UserError(f"a port is a number from 0 to 65535, got {port}; usage: {USAGE}") from error
    return taken


def _serve_on(taken: socket.socket, path: Path) -> None:
    import uvicorn

    from pipeline.serve.app import make_app
    from pipeline.serve.opening import open_session

    opened = open_session(path)
    for note in opened.notes:
        print(f"differs from where it was measured: {note}", flush=True)
    host, port = taken.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(
        f"{opened.manifest.study}: {opened.manifest.backend}, golden scores reproduced within {opened.largest_difference:.1e}, "
        f"serving on http://{shown}:{port}",
        flush=True,
    )
    # uvicorn raises the signal again after it has shut down; by then there is nothing left for it to end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(make_app(opened), log_level="warning", access_log=False, timeout_graceful_shutdown=DRAIN_S)
    uvicorn.Server(config).run(sockets=[taken])
    print("stopped", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Exit code of one command line."""
    if not 1 <= len(arguments) <= 3 or arguments[0] in ("-h", "--help"):
        print(f"usage: {USAGE}", file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    path, host, port = (*arguments, *("", "127.0.0.1", "8000")[len(arguments) :])
    try:
        if not port.isdecimal():
            raise UserError(f"a port is a number from 0 to 65535, got {port!r}; usage: {USAGE}")
        return serve(Path(path), host, int(port))
    except AutotuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
