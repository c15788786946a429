"""A report's text for one case is the same whatever is kept beside it."""

from pathlib import Path

from pipeline.bench import cases


def test_what_is_kept_comes_back_in_the_order_it_is_read_in(tmp_path: Path) -> None:
    case = {"training": {"train_seconds": 3.0, "epochs": 2.0}, "model": {"d_model": 64, "layers": 3}, "margin": 5e-4, "command": "a command"}
    first = cases.gathered(tmp_path, "one", case)["one"]
    again = cases.gathered(tmp_path, "two", case)["one"]
    assert cases.heading("one", first) == cases.heading("one", again)
    assert "epochs 2, train seconds 3" in cases.heading("one", first)[2]


def test_a_table_in_markdown() -> None:
    assert cases.table(("a", "b"), [("1", "2")]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
