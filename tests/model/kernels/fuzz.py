"""Random jagged batches against the float64 oracle, for as long as one likes: python -m tests.model.kernels.fuzz COUNT [SEED]

Forward by tokens and by pages, and the gradient; prints the worst relative error of each and ends with 1 at the first that is too large,
naming the seed that repeats it.
"""

from __future__ import annotations

import sys

import numpy as np

import tests.model.kernels.conftest  # noqa: F401  # first: it decides between the interpreter and the chip
from tests.model.kernels.cases import DTYPES, TOLERANCE, distance, random_case
from tests.model.kernels.test_attention import gradients, last_layer, oracle, run


def main(count: int, first: int) -> int:
    """Exit status."""
    worst: dict[str, float] = {}
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        dtype = DTYPES[seed % len(DTYPES)]
        case = random_case(rng, dtype)
        errors = {"forward": distance(run(case, splits=1 + seed % 3), oracle(case)), "gradient": distance(*gradients(case, rng)) / 2}
        if case.candidates.any():
            errors["pages"] = distance(*last_layer(case, int(rng.choice([16, 32, 64])), rng, splits=1 + seed % 2))
        for name, error in errors.items():
            key = f"{name} {str(dtype)[6:]}"
            worst[key] = max(worst.get(key, 0.0), error)
            if not error < TOLERANCE[dtype]:
                print(f"\nseed {seed}: {key} is off by {error:.2e}, at most {TOLERANCE[dtype]:.0e} is rounding; repeat with COUNT 1 and this seed")
                return 1
        if (seed - first + 1) % 10 == 0 or seed == first + count - 1:
            print(f"\r{seed - first + 1} of {count}: " + ", ".join(f"{k} {v:.1e}" for k, v in sorted(worst.items())), end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
