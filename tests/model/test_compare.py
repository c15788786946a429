"""The comparison trains every rival on a small synthetic log and keeps what is finished."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model import checkpoint, compare
from model.config import ModelConfig
from model.datasets import DataConfig, open_dataset, prepare
from model.metrics import evaluate
from model.train import TrainConfig, score, train
from pipeline.errors import UserError

MODEL = ModelConfig(d_model=16, layers=2, heads=2, max_seq_len=256, scaling_seqlen=256, embedding_dim=8)
TRAIN = TrainConfig(epochs=1, batch_tokens=2048, learning_rate=5e-3, threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare(DataConfig(name="synthetic", events=8000, events_per_user=50), folder, lambda share, text: None)
    return folder


def test_every_rival_has_a_row_with_intervals(data: Path, tmp_path: Path) -> None:
    told: list[float] = []
    rows = compare.compare(TRAIN, MODEL, data, tmp_path, lambda share, text: told.append(share))
    assert [row["name"] for row in rows] == [*compare.RIVALS, compare.REGRESSION]
    assert told == sorted(told)
    assert told[-1] == 1.0
    for row in rows:
        low, high = row["intervals"]["auc/recommendation"]
        assert 0 < low < row["metrics"]["auc/recommendation"] < high < 1
        low, high = row["intervals"]["gauc/recommendation"]
        assert low < row["metrics"]["gauc/recommendation"] < high
    parameters = [row["metrics"]["parameters"] for row in rows]
    assert len(set(parameters)) == 5  # the mask has no parameters: MTGR with and without it are of one size
    assert len({row["metrics"]["auc/recommendation"] for row in rows}) == len(rows)
    assert json.loads((tmp_path / "comparison.json").read_text()) == rows


def test_finished_rows_are_kept_and_other_settings_start_anew(data: Path, tmp_path: Path) -> None:
    names = ("MTGR", compare.REGRESSION)
    compare.compare(TRAIN, MODEL, data, tmp_path, lambda share, text: None, names)
    (kept,) = [path for path in tmp_path.glob("*/row.json") if json.loads(path.read_text())["name"] == "MTGR"]
    kept.write_text(json.dumps({"name": "MTGR", "metrics": {"mark": 1.0}, "intervals": {}}))
    assert compare.compare(TRAIN, MODEL, data, tmp_path, lambda share, text: None, names)[0]["metrics"] == {"mark": 1.0}
    other = TrainConfig(epochs=1, batch_tokens=2048, learning_rate=4e-3, threads=1)
    assert "mark" not in compare.compare(other, MODEL, data, tmp_path, lambda share, text: None, names)[0]["metrics"]
    with pytest.raises(UserError, match="knows MTGR"):
        compare.compare(TRAIN, MODEL, data, tmp_path, lambda share, text: None, ("LSTM",))


def test_row_holds_the_figures_of_evaluate(data: Path) -> None:
    dataset = open_dataset(data)
    samples = list(dataset.samples("test"))
    scores = [np.random.default_rng(i).random(s.labels.shape).astype(np.float32) for i, s in enumerate(samples)]
    row = compare.table_row("noise", samples, scores, dataset.schema.heads, seconds=2.0)
    figures = evaluate(samples, scores, dataset.schema.heads)
    assert row["metrics"] == {name: value for name, value in figures.items() if name.startswith(("auc/", "gauc/"))} | {"seconds": 2.0}
    assert set(row["intervals"]) == set(row["metrics"]) - {"seconds"}


def test_train_writes_a_checkpoint_and_figures_of_both_parts(data: Path, tmp_path: Path) -> None:
    figures = train(TRAIN, MODEL, data, tmp_path / "checkpoint", lambda share, text: None)
    assert {f"{part}/{kind}/recommendation" for part in ("validation", "test") for kind in ("auc", "gauc", "ne", "logloss")} <= set(figures)
    assert figures["events_per_second"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]  # no state is left behind
    assert checkpoint.read_extra(tmp_path / "checkpoint")["metrics"] == figures
    network = checkpoint.load(tmp_path / "checkpoint")
    samples = open_dataset(data).samples("test")
    again = evaluate(samples, score(network, samples), network.schema.heads)
    assert again["auc/recommendation"] == pytest.approx(figures["test/auc/recommendation"], abs=1e-6)


def test_command_line_refuses_nonsense(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="usage"):
        compare.main([])
    with pytest.raises(UserError, match="an override is"):
        compare.main([str(data), str(tmp_path), "epochs=1"])
    with pytest.raises(UserError, match=r"train\.epoch is not"):
        compare.main([str(data), str(tmp_path), "train.epoch=1"])
