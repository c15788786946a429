"""What Triton's Python backend runs: an artifact's session behind tensors of single requests.

Triton hands over the calls that have come while the last batch ran. All of their requests go to the session at once, which packs them, and all are
waited for. Waiting for company is Triton's part, so the session does none of its own. The engine's packages and our sources, in `runtime`, are
imported when Triton makes an instance, which is a process of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as triton
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipeline.contracts import RankingRequest, Scores
    from pipeline.serve.opening import Opened

TIMEOUT_S = 30.0


class TritonPythonModel:
    """One instance: an open session."""

    opened: Opened | None = None

    def initialize(self, args: dict[str, str]) -> None:
        """Verify the artifact, load its engine, replay its golden requests. Raises TritonModelException with the reason."""
        _require_tensors()
        if args["model_instance_kind"] == "GPU":
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]  # before any package of an engine looks
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        folder = Path(args["model_repository"]) / args["model_version"]
        sys.path.insert(0, str(folder / "runtime"))
        from pipeline.errors import AutotuneError
        from pipeline.serve.opening import open_session

        try:
            self.opened = open_session(folder / "artifact", {"serve.max_wait_ms": 0.0})
        except AutotuneError as error:
            raise triton.TritonModelException(str(error)) from error
        for note in self.opened.notes:
            triton.Logger.log_info(f"differs from where it was measured: {note}")
        triton.Logger.log_info(f"{args['model_instance_name']}: golden scores reproduced within {self.opened.largest_difference:.1e}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a call, in order: scores [B, K, heads], or an error of its own."""
        return [self._answer(futures) for futures in [self._submit(request) for request in requests]]

    def finalize(self) -> None:
        """Give the engine back."""
        if self.opened:
            self.opened.session.close()

    def _submit(self, request: Any) -> list[Future[Scores]] | Exception:
        """A future for each request of a call, or why the call cannot be."""
        assert self.opened
        try:
            return [self.opened.session.submit(one) for one in decode(request, self.opened)]
        except Exception as error:  # a call's own mistake, or the engine's: other calls of the batch are answered all the same
            return error

    def _answer(self, futures: list[Future[Scores]] | Exception) -> Any:
        from pipeline.contracts import HEADS
        from pipeline.errors import InvalidRequest, Overloaded

        assert self.opened
        heads = [HEADS.index(head) for head in self.opened.manifest.heads]
        try:
            if isinstance(futures, Exception):
                raise futures
            scores = np.stack([future.result(TIMEOUT_S)[:, heads] for future in futures])
        except InvalidRequest as error:
            return _error(str(error), "INVALID_ARG")
        except Overloaded as error:
            return _error(str(error), "UNAVAILABLE")
        except TimeoutError:
            return _error(f"no answer within {TIMEOUT_S:g} s; retry with fewer candidates or send less", "UNAVAILABLE")
        except Exception as error:
            return _error(f"the engine failed: {type(error).__name__}: {error}", "INTERNAL")
        return triton.InferenceResponse(output_tensors=[triton.Tensor("scores", np.ascontiguousarray(scores, np.float32))])


def decode(request: Any, opened: Opened) -> list[RankingRequest]:
    """The ranking requests of one call, of one length each. Raises InvalidRequest where tensors do not fit each other."""
    from pipeline.contracts import RankingRequest
    from pipeline.errors import InvalidRequest
    from pipeline.serve.codec import static_count

    events, candidates = _array(request, "events"), _array(request, "candidates")
    assert events is not None
    assert candidates is not None
    count, n, k = len(events), events.shape[1], candidates.shape[1]
    user, cross = _array(request, "user"), _array(request, "cross")
    static, visible = _array(request, "static_count"), _array(request, "visible")
    chunk = opened.manifest.limits.get("chunk", 0)
    made = []
    for i in range(count):
        oldest = static_count(None if static is None else int(static[i, 0]), n, chunk)
        if not 0 <= oldest <= n:  # `visible` below depends on it; `validate` would be too late
            raise InvalidRequest(f"static_count must be between 0 and the number of events {n}, got {oldest}")
        made.append(
            RankingRequest(
                user=np.zeros(0, np.int64) if user is None else user[i],
                events=events[i],
                static_count=oldest,
                candidates=candidates[i],
                cross=np.zeros((k, 0), np.float32) if cross is None else cross[i],
                visible=np.full(k, n - oldest, np.int64) if visible is None else visible[i],
            )
        )
    return made


def _array(request: Any, name: str) -> NDArray[Any] | None:
    """A tensor of a call, [B, ...]; None where it was not sent."""
    tensor = triton.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _require_tensors() -> None:
    """Raise TritonModelException unless tensors arrive as they are: a Python backend built for numpy 1 garbles numpy 2's and says nothing."""
    sent = np.arange(6, dtype=np.int64).reshape(2, 3)
    got = triton.Tensor.from_dlpack("probe", triton.Tensor("probe", sent).to_dlpack()).as_numpy()
    if not np.array_equal(sent, got):
        raise triton.TritonModelException(
            f"tensors must arrive as they were sent, but this Triton's Python backend was not built for numpy {np.__version__} and garbles them; "
            "pip install 'numpy<2' where it runs"
        )


def _error(message: str, code: str) -> Any:
    return triton.InferenceResponse(error=triton.TritonError(message, getattr(triton.TritonError, code)))
