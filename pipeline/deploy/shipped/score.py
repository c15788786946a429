"""`python score.py [ARTIFACT] < requests.jsonl`: a request a line in, its scores a line out, in order.

A request is an object as `POST /v1/score` takes it. A line that is no such thing is answered by {"error": message}. Without any line it only proves
the artifact: every file's hash, and its golden scores.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from concurrent.futures import Future
from pathlib import Path

from pipeline.contracts import Scores
from pipeline.errors import AutotuneError, InvalidRequest
from pipeline.serve import codec
from pipeline.serve.opening import Opened, open_session

AHEAD = 64
"""Requests handed over before the first is waited for, so that they share batches."""

Answer = Future[Scores] | InvalidRequest


def submit(opened: Opened, line: str) -> Answer:
    """The future of one line's scores, or what is wrong with the line."""
    try:
        return opened.session.submit(codec.decode(json.loads(line), opened.schema, opened.manifest.limits.get("chunk", 0)))
    except InvalidRequest as error:
        return error
    except ValueError as error:
        return InvalidRequest(f"a line must be JSON: {error}")


def show(opened: Opened, answer: Answer) -> None:
    """Print one line."""
    try:
        if isinstance(answer, InvalidRequest):
            raise answer
        print(json.dumps({"scores": codec.encode(answer.result(), opened.manifest.heads)}), flush=True)
    except AutotuneError as error:
        print(json.dumps({"error": str(error)}), flush=True)


def main(path: Path) -> int:
    """Exit code."""
    try:
        opened = open_session(path)
    except AutotuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in opened.notes:
        print(f"differs from where it was measured: {note}", file=sys.stderr)
    print(f"golden scores reproduced within {opened.largest_difference:.1e}", file=sys.stderr)
    waiting: deque[Answer] = deque()
    for line in sys.stdin:
        waiting.append(submit(opened, line))
        if len(waiting) == AHEAD:
            show(opened, waiting.popleft())
    for answer in waiting:
        show(opened, answer)
    opened.session.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "artifact"))
