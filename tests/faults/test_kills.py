"""`kill -9` at random, until the study is done all the same; `bench faults` does more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.bench import faults


def test_a_study_whose_children_and_self_are_killed_loses_nothing(tmp_path: Path) -> None:
    found = faults.torment(tmp_path, faults.LOCAL, seed=4, trials=4, kills=3)
    assert found.kills.total() == 3
    assert found.finished >= 4
    assert (found.lost, found.unfinished, found.twice) == ([], [], 0)


@pytest.mark.slow
def test_a_cluster_whose_workers_hosts_and_study_are_killed_loses_nothing(tmp_path: Path) -> None:
    found = faults.torment(tmp_path, faults.RAY, seed=1, trials=8, kills=6)
    assert found.kills.total() == 6
    assert (found.lost, found.unfinished, found.twice) == ([], [], 0)


def test_a_result_that_changes_or_goes_is_called_lost(tmp_path: Path) -> None:
    """The judge itself: on a study in which something was really lost."""
    for number, outcome in enumerate(("measured", "measured", "infeasible", "failed")):
        folder = tmp_path / "trials" / f"{number:04d}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(f'{{"outcome": "{outcome}"}}')
    seen: dict[Path, bytes] = {}
    faults._watch(tmp_path, seen)
    assert len(seen) == 3  # a failure is tried again
    (tmp_path / "trials" / "0000" / "result.json").write_text('{"outcome": "measured", "metrics": {}}')
    (tmp_path / "trials" / "0002" / "result.json").unlink()
    tally = faults.Tally()
    faults._lost(seen, tally)
    assert (tally.finished, [Path(p).name for p in tally.lost]) == (3, ["0000", "0002"])
