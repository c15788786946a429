"""Training: it learns, repeats itself bit for bit, survives kill -9, stops early and refuses nonsense."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import pack
from model.loader import Hiding, by_length, epoch_batches, lengths, packed
from model.metrics import evaluate
from model.network import MTGR
from model.resume import STATE_FILE, drop_state, save_state
from model.train import TrainConfig, _Run, fit, masked_loss, resolve_train, score
from pipeline.config import compose
from pipeline.errors import MachineError, UserError
from tests.factories import SCHEMA
from tests.model.training import MODEL, TRAIN, learnable, run

ROOT = Path(__file__).resolve().parents[2]


def _quiet(share: float, text: str) -> None:
    pass


def test_it_learns_what_can_be_learned(tmp_path: Path) -> None:
    held_out = learnable(200, 2)
    config = replace(TRAIN, epochs=8, save_every_s=1e9)
    fresh = MTGR(MODEL, SCHEMA)
    network, figures = fit(config, MODEL, SCHEMA, learnable(600, 0), learnable(100, 1), tmp_path, _quiet)
    before = evaluate(held_out, score(fresh, held_out))
    after = evaluate(held_out, score(network, held_out))
    assert before["auc/recommendation"] < 0.62
    assert after["auc/recommendation"] > 0.78
    assert after["auc/engagement"] > 0.74
    assert after["ne/recommendation"] < 0.85
    assert "auc/monetization" not in after
    assert figures["epochs"] == 8
    assert figures["steps"] > 100


def test_same_seed_same_weights_other_seed_others(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = run(tmp_path / "c", replace(TRAIN, seed=1))
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_kill_and_restart_give_the_same_weights(tmp_path: Path) -> None:
    """The child writes its state after every step; it is killed somewhere in the second pass, twice."""
    wanted = run(tmp_path / "whole")
    state = tmp_path / "killed"
    for stop in ("pass 1.1", "pass 2.0"):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.model.training", str(state)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert any(stop in line for line in child.stdout), "the child ended before it could be killed"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    told: list[str] = []
    resumed = run(state, told=told)
    assert "continuing after step" in told[0]
    assert not any("pass 0." in line or "pass 1." in line for line in told)
    assert all(torch.equal(wanted[name], resumed[name]) for name in wanted)


def test_states_are_saved_less_often_where_saving_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[tuple[float, float]] = []

    def slow(*arguments: Any) -> None:
        began = time.perf_counter()
        time.sleep(0.03)
        spans.append((began, time.perf_counter()))

    monkeypatch.setattr("model.train.save_state", slow)
    config = replace(TRAIN, epochs=10_000, seconds=1.5, save_every_s=0.01)
    fit(config, MODEL, SCHEMA, learnable(50, 0), learnable(20, 1), tmp_path, _quiet)
    assert len(spans) > 2
    assert all(later[0] - earlier[1] >= 9 * 0.03 for earlier, later in pairwise(spans))


def test_the_best_weights_are_copied_only_where_training_goes_on(tmp_path: Path) -> None:
    network = MTGR(MODEL, SCHEMA)
    config = replace(TRAIN, epochs=2, save_every_s=1e9)
    training = _Run(config, network, learnable(50, 0), learnable(20, 1), tmp_path, _quiet)
    training.one_pass(0)
    kept = training.best
    assert all(torch.equal(kept[name], tensor) and kept[name].data_ptr() != tensor.data_ptr() for name, tensor in network.state_dict().items())
    memory = {name: tensor.data_ptr() for name, tensor in kept.items()}
    training.best_value = -1.0
    training.done = 0.75
    training._validate()
    assert {name: tensor.data_ptr() for name, tensor in training.best.items()} == memory
    training.best_value = -1.0
    training.one_pass(1)
    assert training.over
    assert not training.best  # the network itself


def test_a_half_written_state_does_no_harm_and_is_cleared(tmp_path: Path) -> None:
    state = tmp_path / "state"
    wanted = run(state)
    (state / f"{STATE_FILE}.123").write_bytes(b"torn")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in run(state).items())
    drop_state(state)
    assert not state.exists()


def test_state_of_other_settings_or_a_torn_file_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match="other settings, model or data"):
        run(tmp_path, replace(TRAIN, learning_rate=1e-3))
    (tmp_path / STATE_FILE).write_bytes(b"torn")
    with pytest.raises(UserError, match="delete it to train from the start"):
        run(tmp_path)


def test_a_full_disk_is_the_machines_fault_and_keeps_the_last_state(tmp_path: Path) -> None:
    """/dev/full takes no byte."""
    run(tmp_path, replace(TRAIN, epochs=1))
    kept = (tmp_path / STATE_FILE).read_bytes()
    (tmp_path / f"{STATE_FILE}.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(MachineError, match="cannot be written"):
        save_state(tmp_path, "identity", MTGR(MODEL, SCHEMA), [], {})
    assert (tmp_path / STATE_FILE).read_bytes() == kept


def test_early_stop_keeps_the_best_weights(tmp_path: Path) -> None:
    """Labels that are noise in training cannot improve validation for long."""
    samples = [replace(s, labels=np.random.default_rng(i).integers(0, 2, s.labels.shape).astype(np.float32)) for i, s in enumerate(learnable(80, 0))]
    held_out = learnable(60, 1)
    config = replace(TRAIN, epochs=40, patience=2, save_every_s=1e9)
    told: list[str] = []
    network, figures = fit(config, MODEL, SCHEMA, samples, held_out, tmp_path, lambda share, text: told.append(text))
    assert figures["epochs"] < 40
    assert figures["epochs"] == pytest.approx(figures["best_epoch"] + 2)
    seen = [float(text.split()[2].rstrip(",")) for text in told if text.startswith("validation")]
    assert evaluate(held_out, score(network, held_out))["gauc/recommendation"] == pytest.approx(max(seen), abs=6e-5)


def test_a_budget_in_seconds_ends_the_training(tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    config = replace(TRAIN, epochs=10_000, seconds=1.5, save_every_s=1e9)
    _, figures = fit(config, MODEL, SCHEMA, learnable(50, 0), learnable(20, 1), tmp_path, lambda share, text: told.append((share, text)))
    assert 1.5 <= figures["train_seconds"] < 4
    assert told[-1][0] == 1.0
    assert "events/s" in told[-1][1]


def test_a_loss_that_is_no_number_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss became (nan|inf) near step .* lower train.learning_rate"):
        run(tmp_path, replace(TRAIN, learning_rate=1e30, clip_norm=0.0))


def test_masked_loss_is_its_formula(tmp_path: Path) -> None:
    """sum_t w_t * sum_k m_kt BCE_kt / sum_k m_kt over the step's candidates, by loops."""
    samples = learnable(7, 3)
    sizes = lengths([s.request for s in samples])
    rows = by_length(sizes, 10**6)
    assert len(rows) == 1
    batch, labels, known = next(packed(samples, rows, torch.device("cpu"), pack, seed=(0,)))
    logits = torch.randn(labels.shape, generator=torch.Generator().manual_seed(0))
    parts: dict[int, list[float]] = {0: [], 1: [], 2: []}
    row = 0
    for i in rows[0].tolist():
        for candidate in range(len(samples[i].labels)):
            for head, values in parts.items():
                if samples[i].known[candidate, head]:
                    p = 1 / (1 + np.exp(-float(logits[row, head])))
                    values.append(-np.log(p if samples[i].labels[candidate, head] else 1 - p))
            row += 1
    assert len(parts[2]) < len(parts[0])  # one head lacks answers
    wanted = sum(w * float(np.mean(values)) for w, values in zip((1.0, 0.5, 2.0), parts.values(), strict=True))
    got = masked_loss(logits[:, :3], labels[:, :3], known[:, :3], torch.tensor([1.0, 0.5, 2.0]))
    assert float(got) == pytest.approx(wanted, abs=1e-6)
    assert float(masked_loss(logits[:, :1], labels[:, :1], torch.zeros_like(known[:, :1]), torch.ones(1))) == 0
    assert len(batch.candidate_rows) == len(labels)


def test_batches_hold_every_sample_once_within_the_budget() -> None:
    sizes = lengths([s.request for s in learnable(500, 0)])
    for batches in (epoch_batches(sizes, 300, 0, 0, window=64), by_length(sizes, 300)):
        assert sorted(np.concatenate(batches).tolist()) == list(range(500))
        assert all(len(rows) == 1 or sizes[rows].sum() <= 300 for rows in batches)
    first, again, other = (np.concatenate(epoch_batches(sizes, 300, 0, epoch)) for epoch in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    padded = sum(len(rows) * sizes[rows].max(axis=0).sum() for rows in epoch_batches(sizes, 300, 0, 0))
    assert padded < 1.25 * sizes.sum()


def test_unknown_ids_hit_large_tables_only_and_repeat_with_the_seed() -> None:
    samples = learnable(100, 0)
    rows = by_length(lengths([s.request for s in samples]), 10**6)

    def ids(share: float, seed: int) -> tuple[torch.Tensor, ...]:
        hiding = Hiding.of(SCHEMA, share, 50, 0.0, ())
        batch, _, _ = next(packed(samples, rows, torch.device("cpu"), pack, (seed,), hiding))
        return batch.event_ids, batch.candidate_ids

    schema_ids = ids(0.0, 0)
    hidden = ids(0.3, 0)
    for plain, masked in zip(schema_ids, hidden, strict=True):
        changed = plain != masked
        assert 0.2 < float(changed[:, 0].float().mean()) < 0.4  # items have 100 rows
        assert not changed[:, 1:].any()  # actions, gaps and categories have few
        assert (masked[changed] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(hidden, ids(0.3, 0), strict=True))
    assert not torch.equal(hidden[0], ids(0.3, 1)[0])


def test_hidden_columns_are_hidden_for_whole_requests_and_no_others() -> None:
    samples = learnable(400, 0)
    rows = by_length(lengths([s.request for s in samples]), 10**6)
    schema = replace(SCHEMA, cross=("user_rate/recommendation", *(f"item_user_{i}" for i in range(len(SCHEMA.cross) - 1))))

    def cross(share: float) -> np.ndarray[Any, Any]:
        batch, _, _ = next(packed(samples, rows, torch.device("cpu"), pack, (0,), Hiding.of(schema, 0.0, 50, share, ("user_", "absent"))))
        return batch.cross.numpy()

    plain, hidden = cross(0.0), cross(0.5)
    assert (hidden[:, 1:] == plain[:, 1:]).all()
    ends = np.cumsum([len(samples[i].labels) for i in rows[0].tolist()])[:-1]
    kept = [set((part != 0).tolist()) for part in np.split(hidden[:, 0], ends)]
    assert all(len(values) == 1 for values in kept)  # a request keeps the column or loses it
    assert 0.4 < np.mean([values == {True} for values in kept]) < 0.6
    assert np.isin(hidden[hidden[:, 0] != 0, 0], plain[:, 0]).all()


def test_score_keeps_the_order_and_batching_changes_nothing() -> None:
    torch.manual_seed(0)
    network, samples = MTGR(MODEL, SCHEMA), learnable(40, 0)
    small, large = score(network, samples, 100), score(network, [s.request for s in samples], 10**6)
    assert [a.shape for a in small] == [s.labels.shape for s in samples]
    with torch.no_grad():
        for sample, a, b in zip(samples, small, large, strict=True):
            alone = network(*pack([sample.request]).tensors()).numpy()
            np.testing.assert_allclose(a, alone, atol=1e-5)
            np.testing.assert_allclose(b, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"epoch": 3}, "train.epoch is not a setting"),
        ({"epochs": 0}, "train.epochs must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "train.learning_rate must be positive, got -1.0"),
        ({"warmup": 1.0}, r"train.warmup is a share in \[0, 1\), got 1.0"),
        ({"decay": "step"}, "train.decay is one of cosine, linear, got 'step'"),
        ({"head_weights": {"clicks": 1.0}}, "train.head_weights names heads"),
        ({"seconds": -1}, "train.seconds must not be negative"),
        ({"hidden_share": 1}, r"train.hidden_share is a share in \[0, 1\), got 1"),
    ],
)
def test_wrong_settings_are_named(section: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_train(section)
    assert resolve_train({"epochs": 2}) == TrainConfig(epochs=2)


@pytest.mark.parametrize("preset", ["short", "full"])
def test_every_setting_is_in_the_configuration(preset: str) -> None:
    """Hydra refuses a key that conf/ does not name, and a preset must not name one that does not exist."""
    section = compose([f"train={preset}"])[0].train
    assert set(section) == {f.name for f in fields(TrainConfig)}
    resolve_train(section)
