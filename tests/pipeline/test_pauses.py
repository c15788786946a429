"""What a process that serves does to Python, and that it is undone nowhere."""

from __future__ import annotations

import gc
import sys

import pytest

from pipeline import pauses


def test_threads_wait_shortly_and_collections_pass_over_what_there_is(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(gc.unfreeze)
    before = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(before))
    sys.setswitchinterval(0.005)
    loaded: list[list[int]] = [[]]
    assert any(found is loaded for found in gc.get_objects())
    pauses.shorten()
    assert not any(found is loaded for found in gc.get_objects())
    assert sys.getswitchinterval() == pytest.approx(pauses.SWITCH_S)
