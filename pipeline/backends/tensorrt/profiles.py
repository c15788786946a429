"""Optimisation profiles over token buckets: which lengths an engine is planned for, and which profile a batch takes.

Every dynamic axis of `model.export.AXES` is bounded by the tokens of a batch. A profile's kernels and memory are chosen for its own lengths, so that
small batches need not run what was planned for large ones. Lengths are those after `rounding.round_batch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.backends.knobs import ALIGN
from pipeline.backends.rounding import round_up
from pipeline.errors import SettingsError

LONGEST_BUCKET = 256
"""The largest serve.bucket: one request's two padded lengths are multiples of it at most."""

RATIO = 4
"""Tokens of a profile against those of the next smaller one."""

Range = tuple[int, int, int]
"""Least, best and most of an axis."""
Profile = Mapping[str, Range]


def profiles(tokens: int, count: int, max_seq_len: int) -> list[Profile]:
    """`count` of them, the smallest first; the last takes batches of `tokens` places and a request of `max_seq_len` alone.

    Fewer where smaller ones would be empty: a profile has room for a few requests at least.
    """
    longest = -(-max_seq_len // LONGEST_BUCKET) * LONGEST_BUCKET
    top = max(tokens, longest)
    sizes = [top // RATIO**step for step in range(count)]
    return [_profile(size, longest) for size in sorted(sizes) if size == top or size >= 8 * ALIGN]


def _profile(tokens: int, longest: int) -> Profile:
    rows, padded = round_up(tokens), min(longest, -(-tokens // ALIGN) * ALIGN)
    most = {"B": max(1, tokens // (2 * ALIGN)), "E": rows, "C": rows, "T": rows, "Hp": padded, "Kp": padded}
    return {axis: (1, max(1, size // 2), size) for axis, size in most.items()}


def covering(ranges: Sequence[Profile], lengths: Mapping[str, int]) -> int:
    """The first profile that a batch of these lengths fits. Raises SettingsError where none does."""
    for index, profile in enumerate(ranges):
        if all(profile[axis][0] <= length <= profile[axis][2] for axis, length in lengths.items()):
            return index
    last = ranges[-1]
    wrong = ", ".join(
        f"{axis}={n} (takes {last[axis][0]} to {last[axis][2]})" for axis, n in lengths.items() if not last[axis][0] <= n <= last[axis][2]
    )
    raise SettingsError(
        f"a batch must fit one of the engine's {len(ranges)} profiles, got {wrong}; send fewer tokens at once or raise build.max_tokens"
    )


def lengths_of(arrays: Mapping[str, Any], axes: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Length of each dynamic axis of a packed batch."""
    return {axis: int(arrays[name].shape[place]) for name, names in axes.items() if name in arrays for place, axis in enumerate(names)}
