"""The fused engine's batches, through the interpreter where there is no GPU: any size, in any order, equals the oracle."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.model.kernels.conftest  # noqa: F401  # makes kernels run in the interpreter where there is no GPU
from calibration.quantise import quantise
from model import checkpoint
from model.config import ModelConfig
from model.oracle import oracle_scores
from pipeline.backends import fused
from pipeline.backends.batcher import Wait
from pipeline.backends.fused import BACKEND, LOAD, Batches
from pipeline.backends.knobs import settle
from pipeline.backends.session import BatchedSession
from pipeline.contracts import RankingRequest, Settings
from pipeline.errors import CheckpointError, SettingsError
from pipeline.requests import save_requests
from tests.factories import jagged_requests, random_request
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=64, layers=2, heads=2, max_seq_len=256, scaling_seqlen=256, embedding_dim=16)
ON_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def batches() -> Iterator[Batches]:
    from model.fused import FusedMTGR

    network = FusedMTGR(lively_model(CONFIG), "fp32")
    made = Batches(network, 512, steps=1, device="cuda" if ON_GPU else "cpu", graphs=ON_GPU, block=64, inflight=2)
    made.start()
    yield made
    made.close()


def test_batches_of_all_sizes_equal_the_oracle_whatever_came_before(batches: Batches) -> None:
    rng, model = np.random.default_rng(0), lively_model(CONFIG)
    many = jagged_requests(rng, 5)
    few = [random_request(rng, static=3, realtime=2, candidates=1)]
    for requests in (many, few, many[:2], many):
        wanted = np.concatenate([oracle_scores(model, request) for request in requests])
        got = batches.run(requests)
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() < 5e-5
    assert batches.compiled() == 0


def test_scores_given_out_are_not_overwritten(batches: Batches) -> None:
    rng = np.random.default_rng(1)
    first = batches.run(jagged_requests(rng, 2))
    kept = first.copy()
    for _ in range(batches.inflight):
        batches.run(jagged_requests(rng, 2))
    np.testing.assert_array_equal(first, kept)


def test_batches_in_flight_keep_to_themselves(batches: Batches) -> None:
    rng, model = np.random.default_rng(3), lively_model(CONFIG)
    sent = [jagged_requests(rng, 3), [random_request(rng, static=9, candidates=2)], jagged_requests(rng, 4)]
    wanted = [np.concatenate([oracle_scores(model, request) for request in requests]) for requests in sent]
    first, second = batches.launch(sent[0]), batches.launch(sent[1])
    with pytest.raises(RuntimeError, match="at most 2 batches may be in flight, 2 are; wait for one"):
        batches.launch(sent[2])
    found = {1: second()}
    third = batches.launch(sent[2])
    found[0], found[2] = first(), third()
    for number, expected in enumerate(wanted):
        assert np.abs(found[number] - expected).max() < 5e-5


@pytest.mark.parametrize("at", ["pack_jagged", "_enqueue"])
def test_a_batch_that_could_not_begin_takes_no_place(batches: Batches, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    requests = [random_request(np.random.default_rng(4))]
    wanted = batches.run(requests)
    with monkeypatch.context() as planted:
        planted.setattr(fused if at == "pack_jagged" else Batches, at, fail)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                batches.launch(requests)
    first, second = batches.launch(requests), batches.launch(requests)
    np.testing.assert_array_equal(first(), wanted)
    np.testing.assert_array_equal(second(), wanted)


@pytest.mark.parametrize("inflight", [1, 2, 3])
def test_a_session_keeps_as_many_in_flight_as_it_says(inflight: int) -> None:
    from model.fused import FusedMTGR

    model = lively_model(CONFIG)
    made = Batches(FusedMTGR(model, "fp32"), 128, steps=1, device="cuda" if ON_GPU else "cpu", graphs=ON_GPU, block=64, inflight=inflight)
    rng = np.random.default_rng(5)
    requests = [random_request(rng, static=int(rng.integers(0, 9)), candidates=int(rng.integers(1, 5))) for _ in range(8)]
    begun, full = [0], threading.Event()

    def run(batch: Sequence[RankingRequest]) -> Wait:
        wait = made.launch(batch)  # refuses more than it has lanes for
        begun[0] += 1
        if begun[0] == inflight:
            full.set()
        return lambda: wait() if full.wait(10) else pytest.fail("fewer in flight than told")

    session = BatchedSession(
        run, schema=model.schema, max_seq_len=CONFIG.max_seq_len, settings=settle("fused", {"serve.max_batch_tokens": 1}, LOAD),
        effective=made.effective, on_start=made.start, on_close=made.close, depth=inflight,
    )  # fmt: skip
    futures = [session.submit(request) for request in requests]
    for request, future in zip(requests, futures, strict=True):
        assert np.abs(future.result(60) - oracle_scores(model, request)).max() < 5e-5
    assert session.effective["engine.inflight"] == inflight
    session.close()


def test_too_large_a_batch_is_refused(batches: Batches) -> None:
    rng = np.random.default_rng(2)
    with pytest.raises(ValueError, match="no place on a ladder up to 512"):
        batches.run([random_request(rng, static=100, realtime=80, candidates=70) for _ in range(3)])


def test_settings_and_models_it_does_not_know(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint", lively_model(ModelConfig(**{**CONFIG.to_dict(), "layer": "gated_conv", "d_ff": 64})))
    (tmp_path / "engine").mkdir()
    with pytest.raises(SettingsError, match="layer=hstu"):
        BACKEND.build(tmp_path / "checkpoint", {}, tmp_path / "engine")
    checkpoint.save(tmp_path / "right", lively_model(CONFIG))
    with pytest.raises(SettingsError, match=r"build\.residual=half goes with .* got fp32"):
        BACKEND.build(tmp_path / "right", {"build.residual": "half"}, tmp_path / "engine")
    with pytest.raises(SettingsError, match=r"build\.precision takes"):
        BACKEND.build(tmp_path / "checkpoint", {"build.precision": "int8"}, tmp_path / "engine")
    for wrong in (0, 4, 2.0, True):
        with pytest.raises(SettingsError, match=r"engine\.inflight takes one of 1, 2, 3, got"):
            BACKEND.load(tmp_path / "engine", {"engine.inflight": wrong})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint`, and `fp8_max` and `int8_max` made of it."""
    folder = tmp_path_factory.mktemp("fused")
    checkpoint.save(folder / "checkpoint", lively_model(CONFIG))
    save_requests(folder / "calibration.npz", jagged_requests(np.random.default_rng(3), 8))
    for recipe in ("fp8_max", "int8_max"):
        quantise(folder / "checkpoint", recipe, folder / "calibration.npz", folder / recipe, lambda share, text: None)
    return folder


FP8: Settings = {"build.precision": "fp8"}


@pytest.mark.parametrize(("source", "recipe"), [("checkpoint", "none"), ("fp8_max", "fp8_max")])
def test_the_recipe_reported_is_the_one_the_network_holds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, recipe: str
) -> None:
    monkeypatch.setattr(Batches, "start", lambda self: None)  # weights stay on the host, nothing is run
    BACKEND.build(folder / source, {**FP8, "quant.recipe": recipe}, tmp_path)

    def reported() -> object:
        session = BACKEND.load(tmp_path, {})
        session.close()
        return session.effective["quant.recipe"]

    assert reported() == recipe
    described = json.loads((tmp_path / "engine.json").read_text())
    (tmp_path / "engine.json").write_text(json.dumps({**described, "details": {}}))
    assert reported() == "none"


def test_weights_and_scales_of_an_engine_are_the_quantised_checkpoints(folder: Path, tmp_path: Path) -> None:
    BACKEND.build(folder / "fp8_max", {**FP8, "quant.recipe": "fp8_max"}, tmp_path)
    wanted, got = checkpoint.load(folder / "fp8_max", "fp8_max").state_dict(), checkpoint.load(tmp_path / "model").state_dict()
    assert all(torch.equal(value, got[name]) for name, value in wanted.items())
    assert not torch.equal(got["blocks.0.merge.weight"], checkpoint.load(folder / "checkpoint").state_dict()["blocks.0.merge.weight"])
    scales = json.loads((tmp_path / "engine.json").read_text())["details"]["input_scales"]
    assert scales == json.loads((folder / "fp8_max" / "config.json").read_text())["input_scales"]


@pytest.mark.parametrize(("source", "settings", "message"), [
    ("fp8_max", {"build.precision": "bf16", "quant.recipe": "fp8_max"}, r"goes with build\.precision=fp8, got bf16; set that, or quant\.recipe=none"),
    ("fp8_max", {"quant.recipe": "fp8_max"}, r"goes with build\.precision=fp8, got fp32"),
    ("checkpoint", {**FP8, "quant.recipe": "fp8_max"}, "holds float weights; quantise it first"),
    ("fp8_max", FP8, "must be the checkpoint's own, fp8_max, got none"),
    ("int8_max", FP8, "must be the checkpoint's own, int8_max, got none"),
    ("int8_max", {**FP8, "quant.recipe": "fp8_max"}, "must be the checkpoint's own, int8_max, got fp8_max; .* give the checkpoint made for fp8_max"),
    ("int8_max", {**FP8, "quant.recipe": "int8_max"}, r"quant\.recipe takes one of none, fp8_max, got 'int8_max'"),
])  # fmt: skip
def test_recipes_it_cannot_honour(folder: Path, tmp_path: Path, source: str, settings: Settings, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        BACKEND.build(folder / source, settings, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "modelopt.pt"])
def test_a_flipped_byte_in_a_quantised_checkpoint_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder / "fp8_max", tmp_path / "fp8_max")
    content = bytearray((tmp_path / "fp8_max" / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / "fp8_max" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="quantise again"):
        BACKEND.build(tmp_path / "fp8_max", {**FP8, "quant.recipe": "fp8_max"}, tmp_path)


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert "there is no CUDA device" in str(BACKEND.unavailable())
