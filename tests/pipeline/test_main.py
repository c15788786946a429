"""The command line: every command explains itself, and a user's mistake is one message."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import artifact, doctor, interpreters
from pipeline.__main__ import COMMANDS, PLAIN, main
from pipeline.bench import EXPERIMENTS
from pipeline.doctor import Finding


def test_the_commands_are_those_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(COMMANDS) == ["data", "train", "quantize", "tune", "bench", "confirm", "export", "serve", "report", "doctor"]
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert f"`{name}`" in readme
        assert f"  {name} " in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_overrides(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert (COMMANDS[name].__doc__ or "?") in shown
    assert ("backend=compiled|eager|fake|fused|onnxruntime|tensorrt|vllm" in shown and "trials: 12" in shown) != (name in PLAIN)


@pytest.mark.parametrize("word", EXPERIMENTS)
def test_every_experiment_says_what_it_is_and_is_in_the_readme(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", word, "--help"]) == 0
    assert f"bench {word}" in capsys.readouterr().out
    assert f"`bench {word}" in (Path(__file__).resolve().parents[2] / "README.md").read_text()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["tunne"], "'tunne' is not a command"),
        (["tune", "study.trails=3"], "trails"),
        (["export", "one"], "two paths"),
        (["report", "study.name=none"], "none"),
    ],
)
def test_a_mistake_is_one_message(line: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err


def test_doctor_lists_engines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for words in ("engine eager", "engine onnxruntime", "C++ compiler", "memory"):
        assert words in shown


@pytest.mark.parametrize(("own", "arguments"), [("/opt/vllm/python", ["made"]), ("", ["made"]), ("/opt/vllm/python", [])])
def test_an_artifact_is_served_by_the_interpreter_of_its_engine(monkeypatch: pytest.MonkeyPatch, own: str, arguments: list[str]) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(artifact, "read_manifest", lambda path: SimpleNamespace(backend="vllm"))
    monkeypatch.setattr(interpreters, "of", lambda backends, name: own if name == "vllm" else "")
    monkeypatch.setattr(os, "execve", lambda python, told, environment: ran.append([python, *told]))
    COMMANDS["serve"](arguments)
    python = own if own and arguments else sys.executable
    assert ran == [[python, python, "-m", "pipeline.serve", *arguments]]


def test_the_doctor_says_what_to_type_in_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = [Finding(name="engine vllm", ok=False, detail="pip install .[gpu]")]
    monkeypatch.setattr(doctor, "examine", lambda runs, backends: found)
    assert main(["doctor"]) == 0
    assert "pip install .[gpu]" in capsys.readouterr().out
