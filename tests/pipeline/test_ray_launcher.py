"""Trials on a Ray cluster of processes here, whose GPUs are declared, with a PostgreSQL server: what runs where, what is refused, what survives."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from pipeline import ray_launcher, study
from pipeline.bench import toy
from pipeline.cache import locked
from pipeline.config import StudyConfig
from pipeline.contracts import Goal, Objective, Outcome
from pipeline.environment import fingerprint
from pipeline.errors import UserError
from pipeline.ray_launcher import RayLauncher, differing
from pipeline.records import read_study, read_trial, write_json
from search_spaces.space import Choice, Space
from tests.pipeline.trial_folder import make_trial

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[dev]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[toy.Cluster]:
    with toy.Cluster(2) as made:
        yield made
        ray.shutdown()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with toy.postgres() as made:
        yield made


def launcher(cluster: toy.Cluster, root: Path, **options: object) -> RayLauncher:
    made = RayLauncher(address=cluster.address, cache=root / "cache", memory_mib=1024.0, **options)  # type: ignore[arg-type]
    made.open(root)
    return made


def test_hosts_that_differ_do_not_compare() -> None:
    ours = {"cpu": "a", "gpu": "H100, H100", "package.torch": "2.13.0", "memory_gib": "503"}
    assert differing(ours, {**ours, "memory_gib": "504"}) == []
    assert differing(ours, {**ours, "gpu": "A100, A100", "package.torch": "2.14.0"}) == [
        "gpu: was H100, H100, is A100, A100",
        "package.torch: was 2.13.0, is 2.14.0",
    ]
    assert differing(ours, {**ours, "gpu": "A100, H100"})[0] == "gpu: one host mixes A100 and H100"


def test_without_a_cluster_the_way_to_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)no Ray cluster answers at '127\.0\.0\.1:1'.*ray start --head"):
        RayLauncher(address="127.0.0.1:1", cache=tmp_path).open(tmp_path)


def test_a_host_that_does_not_see_our_folders_is_refused(tmp_path: Path) -> None:
    seen, unseen = tmp_path / "seen", tmp_path / "other" / "token"
    seen.write_text("word")
    assert ray_launcher._hello([seen, unseen], "word") == ([tmp_path / "other"], dict(fingerprint()))
    assert ray_launcher._hello([seen], "another word")[0] == [tmp_path]  # a folder of the same name that is not ours


def test_a_trial_runs_on_a_gpu_of_its_own_and_says_where(cluster: toy.Cluster, tmp_path: Path) -> None:
    where = launcher(cluster, tmp_path)
    assert where.slots == 2
    folder = make_trial(tmp_path, {"engine.threads": 5})
    found = where.trial(folder)
    assert found.outcome is Outcome.MEASURED, found.reason
    record = read_trial(folder)
    assert record.measurement == found
    assert record.place == {"host": os.uname().nodename, "gpus": "0"}
    assert not list(tmp_path.glob(".hello*"))


def test_more_gpus_than_a_host_has_cannot_be_asked_for(cluster: toy.Cluster, tmp_path: Path) -> None:
    found = launcher(cluster, tmp_path).trial(make_trial(tmp_path, {"engine.tensor_parallel_size": 4}))
    assert found.outcome is Outcome.INFEASIBLE
    assert "engine.tensor_parallel_size=4 asks for more GPUs than any host of the cluster has (1)" in found.reason


def test_a_trial_whose_worker_died_after_the_result_is_not_run_again(cluster: toy.Cluster, tmp_path: Path) -> None:
    folder = make_trial(tmp_path, {"engine.threads": 5})
    write_json(folder / "result.json", {"outcome": "measured", "metrics": {"a": 1.0}})
    assert launcher(cluster, tmp_path).trial(folder).metrics == {"a": 1.0}
    assert not (folder / "log.txt").exists()


def test_a_trial_that_costs_every_worker_its_life_is_failed(cluster: toy.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    where = launcher(cluster, tmp_path, on_line=lines.append)
    monkeypatch.setattr(ray_launcher, "DEATHS", 2)
    monkeypatch.setattr(ray_launcher, "_run", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    found = where.trial(make_trial(tmp_path))
    assert found.outcome is Outcome.FAILED
    assert "2 workers died while they ran this trial" in found.reason
    assert [line for line in lines if "the worker of trial 0000 died (WorkerCrashedError); running it again" in line] == lines[:2]


def test_what_an_earlier_run_left_is_waited_for(cluster: toy.Cluster, tmp_path: Path) -> None:
    lines: list[str] = []
    held, order = threading.Event(), list[str]()

    def hold() -> None:
        with locked(tmp_path / "trials" / ".0003.lock"):
            held.set()
            time.sleep(1.0)
            order.append("ended")

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    launcher(cluster, tmp_path, on_line=lines.append)
    order.append("opened")
    thread.join()
    assert order == ["ended", "opened"]
    assert lines == ["Ray: waiting for what the last run of this study left running"]


def test_postgresql_is_a_storage_for_studies_of_one_name_in_many_folders(url: str, tmp_path: Path) -> None:
    space = {"e": Space(backend="e", nodes=(Choice(name="engine.x", options=(0, 1, 2, 3), why="a line"),), defaults={"engine.x": 0})}
    goal, config = Goal(objectives=(Objective(metric="latency_ms/p99"),)), StudyConfig(name="s", storage=url)

    def open_in(folder: Path) -> study.Search:
        folder.mkdir(exist_ok=True)
        return study.Search(folder, space, goal, config, ())

    one, other = open_in(tmp_path / "one"), open_in(tmp_path / "other")
    points = [one.ask() for _ in range(3)], [other.ask() for _ in range(3)]
    assert [point.number for point in points[0] if point] == [0, 1, 2]
    assert [point.number for point in points[1] if point] == [0, 1, 2]
    again = open_in(tmp_path / "one")  # what was asked for, and never written to a folder, is not lost
    assert [point.settings for _ in range(3) if (point := again.ask())] == [point.settings for point in points[0] if point]
    assert not (tmp_path / "one" / "study.db").exists()


def test_a_server_that_is_away_is_said_plainly(tmp_path: Path) -> None:
    config = StudyConfig(name="s", storage=f"postgresql://me@/db?host={tmp_path}")
    with pytest.raises(UserError, match=rf"study\.storage=postgresql://me@/db\?host={tmp_path} cannot be used: .*start the server"):
        study.Search(tmp_path, {}, Goal(objectives=(Objective(metric="a"),)), config, ())


def test_a_study_on_a_cluster_and_a_server_survives_the_death_of_a_worker(cluster: toy.Cluster, url: str, tmp_path: Path) -> None:
    toy.make_inputs(tmp_path)
    arguments = [*toy.overrides(tmp_path, "s", 4, 60.0), "launcher=ray", f"launcher.address={cluster.address}", f"study.storage='{url}'"]
    killed: list[int] = []
    with (tmp_path / "log.txt").open("w") as log:
        process = toy.start(arguments, log)
        until = time.monotonic() + 120
        while process.poll() is None:
            assert time.monotonic() < until, (tmp_path / "log.txt").read_text()
            if not killed and (tmp_path / "runs" / "s" / "trials" / "0003" / "log.txt").exists():
                workers = [p for p in psutil.Process().children(recursive=True) if p.is_running() and "ray::_run" in " ".join(p.cmdline()[:1])]
                killed += [worker.pid for worker in workers]
                for worker in workers:
                    worker.kill()
            time.sleep(0.05)
    said = (tmp_path / "log.txt").read_text()
    assert process.returncode == 0, said
    assert killed
    assert "running it again" in said
    found = read_study(tmp_path / "runs" / "s")
    assert [t.number for t in found.trials] == list(range(6))
    assert [t.outcome for t in found.trials] == [Outcome.MEASURED] * 6
    begun = sorted((t.started, t.finished) for t in found.trials[2:])
    assert any(later[0] < earlier[1] for earlier, later in pairwise(begun))  # side by side
    assert not (tmp_path / "runs" / "s" / "study.db").exists()
