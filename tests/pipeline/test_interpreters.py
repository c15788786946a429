"""An engine may live in an interpreter of its own: it is found, and asked there whether it can run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pipeline import environment, interpreters
from pipeline.doctor import examine


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(interpreters, "ROOT", tmp_path)
    monkeypatch.setattr(interpreters, "OWN", {"vllm": ("no_such_package", ".venv-vllm/bin/python")})
    return tmp_path


def make(root: Path, text: str) -> Path:
    python = root / ".venv-vllm/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(text)
    python.chmod(0o755)
    return python


def test_an_environment_of_its_own_is_taken_where_it_is_and_this_one_will_not_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreters.of({}, "vllm") == ""
    python = make(root, "#!/bin/sh\n")
    assert interpreters.of({}, "vllm") == interpreters.of({"vllm": {}}, "vllm") == str(python)
    assert interpreters.of({}, "eager") == ""
    monkeypatch.setattr(interpreters, "OWN", {"vllm": ("numpy", ".venv-vllm/bin/python")})
    assert interpreters.of({}, "vllm") == ""


def test_what_the_configuration_names_goes_first(root: Path) -> None:
    make(root, "#!/bin/sh\n")
    assert interpreters.of({"vllm": {"python": "/opt/python"}, "eager": {"python": "/opt/other"}}, "vllm") == "/opt/python"
    assert interpreters.of({"eager": {"python": "/opt/other"}}, "eager") == "/opt/other"


def test_the_engine_is_asked_there() -> None:
    assert interpreters.unavailable(sys.executable, "fake") is None
    assert "is one of" in (interpreters.unavailable(sys.executable, "warp") or "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#!/bin/sh\necho 'ModuleNotFoundError: numpy' >&2; exit 1\n", "ModuleNotFoundError: numpy.*make vllm-env"),
        (None, "cannot be asked.*backends.vllm.python"),
    ],
)
def test_an_interpreter_that_cannot_answer_is_a_reason(root: Path, text: str | None, words: str) -> None:
    python = make(root, text) if text else root / "nowhere"
    assert re.search(words, interpreters.unavailable(str(python), "vllm") or "")


def test_its_versions_are_asked_there(tmp_path: Path) -> None:
    assert interpreters.fingerprint(sys.executable) == dict(environment.fingerprint())
    assert interpreters.fingerprint(str(tmp_path / "nowhere")) == interpreters.fingerprint(str(make(tmp_path, "#!/bin/sh\nexit 1\n"))) == {}


def test_the_doctor_speaks_for_the_interpreter_that_will_run_it(tmp_path: Path) -> None:
    found = {finding.name: finding for finding in examine(tmp_path, {"fake": {"python": sys.executable}, "eager": {"python": str(tmp_path / "no")}})}
    assert found["engine fake"].ok
    assert sys.executable in found["engine fake"].detail
    assert not found["engine eager"].ok
    assert "backends.eager.python" in found["engine eager"].detail
