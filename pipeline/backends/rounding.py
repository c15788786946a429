"""Round the counts of a packed batch up, so that the same few shapes come again and again.

Some kernels are made anew for every shape they meet (oneDNN's for bf16 are: on a CPU, a shape seen before costs half of a new one). Which
engines want it is theirs to say; float32 products do not.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from model.packing import USER

STEPS = 8
"""Sizes an octave: at most an eighth is padding, and 64 sizes reach from 1 to 2,048."""


def round_up(count: int) -> int:
    """The next size on a scale of `STEPS` sizes an octave; small counts to a multiple of `STEPS`, none to one step."""
    step = max(STEPS, (1 << max(count, 1).bit_length() - 1) // STEPS)
    return max(1, -(-count // step)) * step


def round_batch(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """The batch with E, C and T rounded up. Its first C scores are those of the batch given; the rest mean nothing.

    Rows added are valid ones nobody looks at: no history and no candidate list names them.
    """
    events, candidates, tokens = len(arrays["event_ids"]), len(arrays["candidate_ids"]), len(arrays["kind"])
    more_events, more_candidates, more_tokens = (round_up(count) - count for count in (events, candidates, tokens))
    source = arrays["token_source"].astype(np.int64)
    first_candidate = arrays["user_ids"].size + events
    return {
        **arrays,
        "event_ids": _extend(arrays["event_ids"], more_events, 0),
        "candidate_ids": _extend(arrays["candidate_ids"], more_candidates, 0),
        "cross": _extend(arrays["cross"], more_candidates, 0),
        "token_source": _extend(np.where(source >= first_candidate, source + more_events, source), more_tokens, 0),
        "kind": _extend(arrays["kind"], more_tokens, USER),
        # A padded place names row T: what was T is now a row like any other.
        **{name: np.where(arrays[name] == tokens, tokens + more_tokens, arrays[name]) for name in ("history_index", "candidate_index")},
        "unpad": _extend(arrays["unpad"], more_tokens, 0),
        # An added candidate repeats the first one: its row must be a candidate's.
        "candidate_rows": _extend(arrays["candidate_rows"], more_candidates, int(arrays["candidate_rows"][0])),
    }


def _extend(array: NDArray[np.generic], rows: int, value: int) -> NDArray[np.generic]:
    return np.concatenate([array, np.full((rows, *array.shape[1:]), value, dtype=array.dtype)])
