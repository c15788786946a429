"""Every batch that the batcher can make fits a profile, the smallest that holds it; others are refused."""

import numpy as np
import pytest

from model.export import AXES
from model.packing import pack_numpy
from pipeline.backends.batcher import padded_shape
from pipeline.backends.rounding import round_batch
from pipeline.backends.tensorrt.profiles import LONGEST_BUCKET, covering, lengths_of, profiles
from pipeline.errors import SettingsError
from tests.factories import random_request


@pytest.mark.parametrize("multiple", [8, 64, LONGEST_BUCKET])
def test_what_the_batcher_makes_fits(multiple: int) -> None:
    rng, tokens, longest = np.random.default_rng(0), 1024, 500
    ranges = profiles(tokens, 3, longest)
    smallest = [random_request(rng, static=0, realtime=0, candidates=1) for _ in range(tokens // (2 * multiple))]
    mixed = [random_request(rng, static=int(s), realtime=3, candidates=int(k)) for s, k in rng.integers(1, 60, (40, 2))]
    while len(mixed) * sum(np.max([padded_shape(r, multiple) for r in mixed], axis=0)) > tokens and len(mixed) > 1:
        mixed.pop()
    history = [random_request(rng, static=longest - 3, realtime=0, candidates=1)]
    candidates = [random_request(rng, static=0, realtime=0, candidates=longest - 2)]
    for batch in (smallest, mixed, history, candidates):
        lengths = lengths_of(round_batch(pack_numpy(batch, multiple)), AXES)
        assert 0 <= covering(ranges, lengths) < len(ranges)


def test_the_smallest_profile_that_holds_it_is_taken() -> None:
    ranges = profiles(4096, 3, 512)
    assert [dict(profile)["T"][2] for profile in ranges] == [256, 1024, 4096]
    tiny = {"B": 1, "E": 8, "C": 8, "T": 16, "Hp": 8, "Kp": 8}
    assert [covering(ranges, {**tiny, "T": size}) for size in (16, 256, 264, 1024, 4096)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("axis", ["B", "E", "C", "T", "Hp", "Kp"])
def test_a_batch_outside_of_all_is_refused_and_the_axis_named(axis: str) -> None:
    tiny = {"B": 1, "E": 8, "C": 8, "T": 16, "Hp": 8, "Kp": 8}
    ranges = profiles(1024, 2, 512)
    for length in (0, 100_000):
        with pytest.raises(SettingsError, match=rf"fit one of the engine's 2 profiles, got {axis}={length} \(takes 1 to \d+\); send fewer"):
            covering(ranges, {**tiny, axis: length})


def test_profiles_too_small_for_anything_are_left_out() -> None:
    assert len(profiles(256, 4, 100)) == 2
    assert len(profiles(64, 1, 2000)) == 1  # and holds the longest request all the same
    assert dict(profiles(64, 1, 2000)[0])["Hp"][2] == 2048
