"""Batches of any size in a few fixed ones: what a captured graph wants, at the price of some rows that nobody looks at.

A rung holds up to `tokens` tokens. Candidates and requests come in few levels a rung, because a graph must exist for each: the last layer and
the heads cost what the candidates' room is, and every request that has room adds two empty tiles to each attention.
"""

from __future__ import annotations

from model.jagged import Sizes

SMALLEST = 128
LEVELS = ((8, 256), (2, 256), (2, 32), (1, 1))
"""(part of the tokens that may be candidates, tokens a request has on average at least); four requests more have room. The last holds any batch."""


def tokens_of(largest: int, steps: int) -> list[int]:
    """Rungs from SMALLEST to the first that holds `largest` tokens, `steps` an octave, each a multiple of 64. Raises ValueError for steps < 1."""
    if steps < 1:
        raise ValueError(f"a ladder has at least 1 step an octave, got {steps}")
    rungs = [SMALLEST]
    while rungs[-1] < largest:
        number = len(rungs)
        rungs.append(max(rungs[-1] + 64, round(SMALLEST * 2 ** (number / steps) / 64) * 64))
    return rungs


def sizes(tokens: int, block: int) -> list[Sizes]:
    """The levels of one rung, the smallest first."""
    found = []
    for share, per_request in LEVELS:
        requests, candidates = min(tokens, tokens // per_request + 4), tokens // share
        found.append(
            Sizes(
                requests=requests,
                events=tokens,
                candidates=candidates,
                tokens=tokens,
                tiles=tokens // block + 2 * requests,
                candidate_tiles=candidates // block + requests,
            )
        )
    return found


def fitting(needed: Sizes, tokens: int, block: int) -> Sizes | None:
    """The smallest level of a rung that holds `needed`; None where it is too large for the rung."""
    return next((room for room in sizes(tokens, block) if room.holds(needed)), None)
