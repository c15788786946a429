"""The table of recipes: what stands in a row, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import gate
from pipeline.backends.quantised import EVERY
from pipeline.bench import recipes
from pipeline.contracts import HEADS, LabelledRequest
from pipeline.errors import UserError
from tests.factories import random_request


@pytest.fixture(scope="module")
def samples() -> list[LabelledRequest]:
    rng = np.random.default_rng(0)
    return [
        LabelledRequest(
            request=random_request(rng, candidates=20, user_key=user),
            labels=(rng.random((20, 4)) < 0.4).astype(np.float32),
            known=np.ones((20, 4), np.bool_),
            time=np.arange(20),
        )
        for user in range(60)
    ]


def row(samples: list[LabelledRequest], name: str, noise: float) -> recipes.Row:
    """Scores that know the labels a little, and the same with noise."""
    rng = np.random.default_rng(1)
    expected = [(0.3 + 0.2 * s.labels + 0.1 * rng.random(s.labels.shape)).astype(np.float32) for s in samples]
    scores = [(e + noise * rng.normal(size=e.shape)).astype(np.float32) for e in expected]
    judged = recipes.judge(samples, scores, expected, HEADS, 5e-4, name)
    return {"name": name, "file": 1e6, "packed": 5e5, "requires": "", **judged}


def test_the_same_scores_pass_and_noise_fails(samples: list[LabelledRequest]) -> None:
    same, other = row(samples, "int8_max", 0.0), row(samples, "int8_max", 0.3)
    assert (same["verdict"], same["refused"], same["score_diff/max"]) == (gate.PASSES, "", 0.0)
    assert {head["verdict"] for head in same["heads"].values()} == {gate.PASSES}
    assert other["verdict"] == gate.FAILS
    assert other["heads"][HEADS[0]]["auc"] < same["heads"][HEADS[0]]["auc"]


def test_a_row_that_a_trial_would_refuse_is_marked(samples: list[LabelledRequest]) -> None:
    assert "in fp32: the engine computes something else" in row(samples, "fp32", 1e-3)["refused"]
    assert not row(samples, "fp16", 1e-3)["refused"]


def test_a_recipe_is_not_refused_for_its_own_scores(samples: list[LabelledRequest]) -> None:
    """An engine is held to them, so there is nothing to hold them to."""
    rng = np.random.default_rng(1)
    expected = [rng.random(s.labels.shape).astype(np.float32) for s in samples]
    scores = [expected[0] + 0.5, *(e + np.float32(1e-3) for e in expected[1:])]
    judged = {name: recipes.judge(samples, scores, expected, HEADS, 5e-4, name) for name in ("int8_max", "bf16")}
    assert judged["int8_max"]["score_diff/max"] > 100 * judged["int8_max"]["score_diff/p50"]
    assert not judged["int8_max"]["refused"]
    assert "in bf16: the engine computes something else" in judged["bf16"]["refused"]


def test_scores_that_are_not_finite_have_no_figures(samples: list[LabelledRequest], tmp_path: Path) -> None:
    found = row(samples, "fp16", float("nan"))
    assert found["verdict"] == found["heads"][HEADS[2]]["verdict"] == "not finite"
    assert "got 4800 that are not" in found["refused"]
    case = {"command": "a", "model": {"d_model": 64, "layers": 3}, "training": {}, "heads": list(HEADS), "margin": 5e-4, "rows": [found]}
    recipes.keep(tmp_path, "one", case)
    assert "| fp16 | 1.00 | 0.50 | - ! | - | not finite (no figure) |" in (tmp_path / "report.md").read_text()


def test_cases_are_kept_side_by_side(samples: list[LabelledRequest], tmp_path: Path) -> None:
    case = {"command": "a command", "model": {"d_model": 64, "layers": 3}, "training": {"epochs": 2.0}, "heads": list(HEADS), "margin": 5e-4}
    recipes.keep(tmp_path, "one", {**case, "rows": [row(samples, "fp32", 0.0), row(samples, "nvfp4", 0.1)]})
    recipes.keep(tmp_path, "two", {**case, "rows": [row(samples, "fp32", 1e-3)]})
    recipes.keep(tmp_path, "two", {**case, "command": "another command", "rows": [row(samples, "fp32", 1e-3)]})
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"one", "two"}
    text = (tmp_path / "report.md").read_text()
    assert text.count("    a command") == 1
    assert text.count("    another command") == 1
    assert "| nvfp4 | 1.00 | 0.50 |" in text
    assert "passes (0.0e+00)" in text
    assert " ! |" in text


def test_every_row_is_a_recipe_or_a_precision() -> None:
    assert set(recipes.ROWS) - set(recipes.PRECISIONS) <= set(EVERY)
    with pytest.raises(UserError, match=r"bench recipes takes recipes out of fp32, .*, got int3$"):
        recipes.main(["recipes=[int3,fp16]"])
    with pytest.raises(UserError, match=r"got none$"):
        recipes.main(["recipes=[]"])
