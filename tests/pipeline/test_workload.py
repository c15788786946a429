from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from model.datasets import DataConfig, open_dataset, prepare
from pipeline import stages, workload
from pipeline.config import PathsConfig, TuneConfig, WorkloadConfig
from pipeline.errors import DataError
from pipeline.requests import load_labelled, load_requests, save_requests, validate
from tests.factories import random_request
from tests.pipeline.trial_folder import labelled, timed

SIZES = {"quality_users": 5, "calibration_users": 7, "parity_requests": 6, "golden_requests": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare(DataConfig(name="synthetic", events=12_000, events_per_user=100), folder)
    return folder


def draw(data: Path, out: Path, **changes: object) -> dict[str, object]:
    out.mkdir()
    config = asdict(WorkloadConfig(requests=460, confirm_requests=470)) | SIZES | changes
    return workload.make_inputs(data, config, out, lambda share, text: None)


def test_all_files_are_drawn_and_fit_the_model(data: Path, tmp_path: Path) -> None:
    summary = draw(data, tmp_path / "a")
    dataset = open_dataset(data)
    counts = {name: len(load_requests(tmp_path / "a" / f"{name}.npz")) for name in ("workload", "confirm_workload", "parity", "golden")}
    assert counts == {"workload": 460, "confirm_workload": 470, "parity": 6, "golden": 3}
    requests = load_requests(tmp_path / "a" / "workload.npz")
    for request in requests:
        validate(request, dataset.schema, dataset.max_tokens)
    assert all(16 <= len(r.candidates) <= 64 for r in requests)
    assert requests[-1].arrival_s / 460 == pytest.approx(1, rel=0.2)
    tested = {s.request.user_key for s in load_labelled(tmp_path / "a" / "quality.npz")}
    assert len(tested) == 5
    assert not tested & {r.user_key for r in load_requests(tmp_path / "a" / "calibration.npz")}
    assert summary["workload"]["requests"] == 460  # type: ignore[index]


def test_the_seed_is_the_list(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 9)):
        draw(data, tmp_path / name, seed=seed)

    def cross(name: str, file: str = "workload.npz") -> bytes:
        return b"".join(r.cross.tobytes() for r in load_requests(tmp_path / name / file))

    assert cross("a") == cross("b") != cross("c")
    assert cross("a")[:4000] != cross("a", "confirm_workload.npz")[:4000]


def test_arrivals_are_compressed_to_a_rate(tmp_path: Path) -> None:
    save_requests(tmp_path / "w.npz", timed(np.random.default_rng(0), 50))
    unit, fast = workload.load(tmp_path / "w.npz"), workload.load(tmp_path / "w.npz", 200.0)
    assert [r.arrival_s for r in fast] == pytest.approx([r.arrival_s / 200 for r in unit])


def test_arrivals_out_of_order_are_refused(tmp_path: Path) -> None:
    save_requests(tmp_path / "w.npz", timed(np.random.default_rng(0), 5)[::-1])
    with pytest.raises(DataError, match="order of their arrival"):
        workload.load(tmp_path / "w.npz")


def test_each_workload_warms_up_for_the_other() -> None:
    assert workload.other("workload.npz") == "confirm_workload.npz"
    assert workload.other("confirm_workload.npz") == "workload.npz"


def test_users_are_drawn_whole() -> None:
    samples = labelled(np.random.default_rng(0), 20)  # two a user
    some = workload.of_users(samples, 4, seed=0)
    assert len(some) == 8
    assert len({s.request.user_key for s in some}) == 4
    assert len(workload.of_users(samples, 0, seed=0)) == len(workload.of_users(samples, 99, seed=0)) == 20
    assert [s.request.user_key for s in workload.of_users(samples, 4, 1)] != [s.request.user_key for s in some]


def test_lengths_are_summarised() -> None:
    requests = timed(np.random.default_rng(0), 30)
    summary = workload.lengths(requests)
    assert summary["tokens/max"] == max(r.tokens for r in requests)
    assert summary["candidates/p50"] == np.median([len(r.candidates) for r in requests])


def test_how_much_is_met_again_is_summarised(data: Path, tmp_path: Path) -> None:
    request = random_request(np.random.default_rng(0))
    longer = replace(request, events=np.concatenate([request.events, request.events[:4]]))
    moved = replace(longer, static_count=request.static_count + 1)
    other = replace(request, user_key=request.user_key + 1)
    history = len(request.user) + len(request.events)
    summary = workload.lengths([request, other, longer, moved])
    assert summary["returning/share"] == 0.5
    assert summary["returning/history_share"] == history / (4 * history + 8)
    for name, share, growth in (("none", 0.0, 0), ("some", 0.5, 2)):
        drawn = draw(data, tmp_path / name, returning=share, growth=growth)["workload"]
        assert drawn["returning/share"] == pytest.approx(share, abs=0.01)  # type: ignore[index]
        assert (drawn["returning/history_share"] > 0.3) == bool(share)  # type: ignore[index]


def test_the_calibration_set_is_part_of_every_quantised_checkpoints_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same bytes and so the same key; another seed, or another recipe, another one."""
    everyone = labelled(np.random.default_rng(0), 40)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "manifest.json").write_text("{}")
    checkpoint = stages.Checkpoint(folder=tmp_path / "checkpoint", heads=("recommendation",), model={})
    keys: list[str] = []
    monkeypatch.setattr(stages.Cache, "folder", lambda self, kind, key, make: keys.append(f"{kind}/{key}") or tmp_path)
    for name, seed, recipe in (("a", 1, "int8_max"), ("b", 1, "int8_max"), ("c", 2, "int8_max"), ("a", 1, "fp8_max")):
        (tmp_path / name).mkdir(exist_ok=True)
        save_requests(tmp_path / name / "calibration.npz", workload.of_users(everyone, 8, seed))
        stages.quantise(TuneConfig(paths=PathsConfig(cache=str(tmp_path))), recipe, checkpoint, tmp_path / name)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
