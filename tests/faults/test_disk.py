"""A full disk: one clear message, nothing half-written, nothing finished lost, and on with it once there is room."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cache import Cache
from pipeline.contracts import Outcome
from pipeline.errors import MachineError
from pipeline.launcher import LocalLauncher
from tests.pipeline.trial_folder import make_trial


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of one MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs needs root: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_the_machines_fault_and_leaves_nothing(small_disk: Path) -> None:
    cache = Cache(small_disk)
    kept = cache.folder("data", "kept", lambda out: (out / "x").write_bytes(b"x" * 1000) and None)
    with pytest.raises(MachineError, match="no room left under"):
        cache.folder("data", "big", lambda out: (out / "x").write_bytes(b"x" * 2**21) and None)
    assert (kept / "x").read_bytes() == b"x" * 1000
    assert sorted(p.name for p in (small_disk / "data").iterdir()) == [".big.lock", ".kept.lock", "kept", "kept.json"]
    assert cache.folder("data", "big", lambda out: (out / "x").write_bytes(b"x") and None).is_dir()


def test_libraries_that_hide_the_reason_are_seen_through(small_disk: Path) -> None:
    def hides(out: Path) -> None:
        try:
            (out / "x").write_bytes(b"x" * 2**21)
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0") from None

    with pytest.raises(MachineError, match="free some space"):
        Cache(small_disk).folder("data", "k", hides)

    def plain(out: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        Cache(small_disk).folder("data", "k", plain)


def test_a_trial_whose_cache_is_full_is_failed_not_infeasible(small_disk: Path, tmp_path: Path) -> None:
    folder = make_trial(tmp_path)
    text = (folder / "candidate.json").read_text()
    (folder / "candidate.json").write_text(text.replace(str(tmp_path / "cache"), str(small_disk / "cache")))
    (small_disk / "cache").mkdir()
    (small_disk / "filler").write_bytes(b"x" * (2**20))
    found = LocalLauncher(cache=tmp_path / "lock", deadline_s=60).trial(folder)
    assert found.outcome is Outcome.FAILED
    assert "no room left under" in found.reason


def test_a_trial_folder_that_is_full_is_failed_with_one_message(small_disk: Path, tmp_path: Path) -> None:
    folder = small_disk / "0000"
    shutil.copytree(make_trial(tmp_path), folder)
    (small_disk / "filler").write_bytes(b"x" * (2**20 - 3 * 4096))  # candidate.json, log.txt and one page more
    found = LocalLauncher(cache=tmp_path / "lock", deadline_s=60).trial(folder)
    assert found.outcome is Outcome.FAILED
    assert "no room left" in found.reason
    assert "Traceback" not in found.reason
