from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.cache import Cache, digest, key, locked

ROOT = Path(__file__).resolve().parents[2]


def write(out: Path) -> None:
    (out / "sub").mkdir()
    (out / "sub" / "a.txt").write_text("whole")


def test_a_key_is_a_function_of_content_and_not_of_order() -> None:
    assert key({"a": 1, "b": {"c": 2.5}}) == key({"b": {"c": 2.5}, "a": 1})
    assert key({"a": 1}) != key({"a": 1.5}) != key({"b": 1.5})
    with pytest.raises(TypeError):
        key({"a": Path("x")})
    with pytest.raises(ValueError, match="JSON compliant"):
        key({"a": float("nan")})


def test_a_digest_sees_names_and_contents_but_not_the_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    (tmp_path / "two" / "sub" / "a.txt").write_text("Whole")
    assert digest(tmp_path / "one") != digest(tmp_path / "two")
    (tmp_path / "one" / "sub" / "a.txt").rename(tmp_path / "one" / "sub" / "b.txt")
    (tmp_path / "two" / "sub" / "a.txt").write_text("whole")
    assert digest(tmp_path / "one") != digest(tmp_path / "two")


def test_made_once_then_found(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), []

    def make(out: Path) -> None:
        made.append(out)
        write(out)

    first = cache.folder("engine", "k", make)
    assert cache.folder("engine", "k", make) == first == tmp_path / "engine" / "k"
    assert len(made) == 1
    assert (first / "sub" / "a.txt").read_text() == "whole"
    assert 0 < cache.seconds("engine", "k") <= cache.made_s
    assert Cache(tmp_path).made_s == 0
    assert cache.seconds("engine", "none") == 0


def test_what_make_raises_goes_through_and_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def broken(out: Path) -> None:
        (out / "half").write_text("half")
        assert cache.find("engine", "k") is None
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        cache.folder("engine", "k", broken)
    assert [p.name for p in (tmp_path / "engine").iterdir()] == [".k.lock"]
    assert cache.folder("engine", "k", write).is_dir()


@pytest.mark.parametrize("damage", ["unlink", "cut", "unrecorded", "record"])
def test_a_folder_that_is_not_whole_is_made_again(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path)
    file = cache.folder("engine", "k", write) / "sub" / "a.txt"
    if damage == "unlink":
        file.unlink()
    elif damage == "cut":
        file.write_text("wh")
    elif damage == "unrecorded":
        (tmp_path / "engine" / "k.json").unlink()
    else:
        (tmp_path / "engine" / "k.json").write_text('{"files": {')
    assert cache.find("engine", "k") is None
    cache.folder("engine", "k", write)
    assert file.read_text() == "whole"


MAKER = """
import sys, time
from pathlib import Path
from pipeline.cache import Cache
def make(out):
    with open(sys.argv[2], "a") as log: log.write("made\\n")
    (out / "half").write_text("half")
    time.sleep(float(sys.argv[3]))
    (out / "whole").write_text("whole")
print(Cache(Path(sys.argv[1])).folder("engine", "k", make, resumable=len(sys.argv) > 4))
"""


def maker(root: Path, log: Path, seconds: float, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", MAKER, str(root), str(log), str(seconds), *more], cwd=ROOT, stdout=subprocess.PIPE)


def test_two_processes_build_once(tmp_path: Path) -> None:
    both = [maker(tmp_path / "cache", tmp_path / "log", 0.3) for _ in range(2)]
    found = {p.communicate()[0] for p in both}
    assert len(found) == 1
    assert [p.returncode for p in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_killed_maker_leaves_no_half_folder(tmp_path: Path) -> None:
    def kill(*more: str) -> None:
        process = maker(tmp_path / "cache", tmp_path / "log", 60, *more)
        half = tmp_path / "cache" / "engine" / ".k.part" / "half"
        until = time.monotonic() + 20
        while not half.exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    cache = Cache(tmp_path / "cache")
    kill()
    assert cache.find("engine", "k") is None
    seen = []
    cache.folder("engine", "k", lambda out: seen.append(os.listdir(out)) or ((out / "x").write_text("x") and None))
    assert seen == [[]]
    (tmp_path / "cache" / "engine" / "k.json").unlink()
    kill("resumable")
    cache.folder("engine", "k", lambda out: seen.append(os.listdir(out)), resumable=True)
    assert seen == [[], ["half"]]


def test_a_lock_waits_and_says_so_once(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path / "lock", lambda: order.append("waits")):
            order.append("second")

    with locked(tmp_path / "lock", lambda: order.append("never")):
        thread = threading.Thread(target=second)
        thread.start()
        until = time.monotonic() + 10
        while not order and time.monotonic() < until:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["waits", "first", "second"]


def test_the_record_names_every_file(tmp_path: Path) -> None:
    Cache(tmp_path).folder("engine", "k", write)
    assert json.loads((tmp_path / "engine" / "k.json").read_text())["files"] == {"sub/a.txt": 5}
