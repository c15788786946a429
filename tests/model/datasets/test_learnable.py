"""The distance of a small trained model to the known optimum."""

from pathlib import Path

import pytest

from model.config import SIZES
from model.datasets import DataConfig, prepare
from model.train import TrainConfig, train


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_model_comes_within_two_points_of_the_optimum(tmp_path: Path) -> None:
    summary = prepare(DataConfig(name="synthetic", events=200_000), tmp_path / "data")
    # Nothing hidden: here the users of the test are those of the training, and what sums them up is worth learning.
    figures = train(TrainConfig(epochs=4, hidden_share=0.0, threads=1), SIZES["tiny"], tmp_path / "data", tmp_path / "model", lambda done, text: None)
    gaps = {head: figures[f"test/auc_below_bayes/{head}"] for head in summary["bayes_auc"]}
    assert all(gaps[head] == best - figures[f"test/auc/{head}"] for head, best in summary["bayes_auc"].items())
    assert all(gap < 0.02 for gap in gaps.values()), gaps
    assert all(gap > -0.02 for gap in gaps.values()), f"better than the optimum means that the labels leak: {gaps}"
