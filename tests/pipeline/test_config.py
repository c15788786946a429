"""Overrides become frozen dataclasses once, at the door; what does not fit is refused with the way out."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import psutil
import pytest
import yaml

import search_spaces
from pipeline.config import CONF, GoalConfig, TuneConfig, compose
from pipeline.errors import UserError


def test_defaults_compose_into_frozen_dataclasses() -> None:
    config, text = compose([])
    assert isinstance(config, TuneConfig)
    assert list(config.backends) == ["eager", "compiled", "onnxruntime", "fused"]
    assert isinstance(config.goal, GoalConfig)
    assert config.goal.objectives == ["latency_ms/p99"]
    assert yaml.safe_load(text)["model"]["size"] == "tiny"
    with pytest.raises(FrozenInstanceError):
        config.checkpoint = "elsewhere"  # type: ignore[misc]


def test_every_engine_can_be_named_and_has_a_space() -> None:
    assert {path.stem for path in CONF.glob("backend/*.yaml")} == set(search_spaces.ENGINES)


def test_a_trial_may_take_half_of_the_memory_unless_told() -> None:
    assert compose(["study.memory_mib=512"])[0].study.memory_limit_mib == 512
    assert compose([])[0].study.memory_limit_mib == pytest.approx(psutil.virtual_memory().total / 2**21)


def test_a_cluster_brings_its_own_share_of_the_cpu() -> None:
    assert compose([])[0].launcher.name == "local"
    config, _ = compose(["launcher=ray", "launcher.address=head:6379", "study.storage='postgresql://me@db/tune?host=/run/pg'"])
    assert (config.launcher.name, config.launcher.address) == ("ray", "head:6379")
    assert config.study.storage == "postgresql://me@db/tune?host=/run/pg"
    assert config.measure.foreign_share == 0.5
    assert compose(["launcher=ray", "measure.foreign_share=0.1"])[0].measure.foreign_share == 0.1


def test_groups_values_and_pins_override() -> None:
    config, _ = compose(["goal=throughput", "backend=[eager]", "study.trials=3", "+settings.engine.threads=1", "model=small"])
    assert config.goal.bounds[0].metric == "latency_ms/p99"
    assert config.goal.bounds[0].relative
    assert list(config.backends) == ["eager"]
    assert config.study.trials == 3
    assert config.settings == {"engine.threads": 1}
    assert config.model["size"] == "small"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["study.trails=3"], "trails"),
        (["study.trials=many"], "many"),
        (["model=huge"], "huge"),
        (["backend=[]"], "at least one engine"),
        (["workload.requests=100"], "at least 459"),
        (["workload.growth=-1"], "workload.growth"),
        (["study.name=a/b"], "study.name"),
        (["study.sampler=grid"], "tpe, random"),
        (["measure.load=1.5"], "measure.load"),
        (["measure.false_reject=0.6"], "measure.false_reject is an error rate above 0 and below 0.5, got 0.6"),
        (["measure.false_accept=0"], "measure.false_accept is an error rate"),
        (["measure.limit_ms=-1"], "measure.limit_ms must be 0"),
        (["goal.objectives=[-throughput_rps/within_limit]"], "set measure.limit_ms"),
        (["study.memory_mib=-1"], "half of the machine's memory"),
        (["model.width=3"], "width"),
        (["study.minutes=-1"], "study.minutes must be positive, or 0 for no limit"),
        (["study.engine_seconds=-1"], "study.engine_seconds must be positive"),
        (["study.storage=mysql://host/db"], "postgresql://user@host/database"),
        (["study.storage=postgresql://me:secret@host/db"], r"takes no password; put that in ~/\.pgpass"),
        (["study.storage='postgresql://me@/db?password=secret'"], "takes no password"),
        (["launcher=slurm"], "slurm"),
        (["launcher.name=slurm"], "local, ray"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compose(overrides)


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_choice_of_every_group_composes(path: Path) -> None:
    own_files = ["data.path=log.parquet"] if "path: ???" in path.read_text() else []
    compose([f"{path.parent.name}={path.stem}", *own_files])


def test_a_data_set_of_ones_own_needs_its_path() -> None:
    with pytest.raises(UserError, match=r"data\.path"):
        compose(["data=parquet"])
