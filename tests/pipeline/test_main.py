"""The command line: every command explains itself, and a user's mistake is one message."""

from pathlib import Path

import pytest

from pipeline.__main__ import COMMANDS, PLAIN, main


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
    assert ("backend=compiled|eager|fake|fused|onnxruntime|vllm" in shown and "trials: 12" in shown) != (name in PLAIN)


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
