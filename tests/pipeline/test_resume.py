"""One process a study, and no figures mixed that do not compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import resume
from pipeline.errors import UserError
from tests.pipeline.fake_study import config


def test_one_process_a_study(tmp_path: Path) -> None:
    with (
        resume.alone(tmp_path / "s"),
        pytest.raises(UserError, match=r"study 's' is being run by process \d+; wait for it"),
        resume.alone(tmp_path / "s"),
    ):
        pass
    with resume.alone(tmp_path / "s"):  # free again
        pass


def test_resume_names_what_changed(tmp_path: Path) -> None:
    then, now = ({"cpu": "a"}, {"workload.seed": "1"}), ({"cpu": "b"}, {"workload.seed": "2"})
    resume.check_resume(tmp_path, "auto", None, now)
    resume.check_resume(tmp_path, "auto", then, then)
    resume.check_resume(tmp_path, "force", then, now)
    with pytest.raises(UserError, match=r"(?s)cpu: was a, is b\n  workload\.seed: was 1, is 2"):
        resume.check_resume(tmp_path, "auto", then, now)
    with pytest.raises(UserError, match="holds a study already"):
        resume.check_resume(tmp_path, "never", then, then)


def test_what_may_change_is_left_out_of_what_is_fixed(tmp_path: Path) -> None:
    base = config(tmp_path)

    def changed(**values: object) -> set[str]:
        other = resume.fixed(replace(base, study=replace(base.study, **values)), ("fake",))  # type: ignore[arg-type]
        return {name for name, value in resume.fixed(base, ("fake",)).items() if other[name] != value}

    assert changed(trials=99, minutes=3.0, engine_seconds=5.0, confirm_pairs=9, neighbours=3, max_failed_in_row=7) == set()
    assert changed(seed=4) == {"study.seed"}
    assert changed(noise_windows=2) == {"study.noise_windows"}  # trial 2 would be one of them, and was the search's
