"""A study folder to a report a person reads: `index.html` (self-contained, works offline), `report.md` and its `figures/*.svg`.

`facts` computes, `figures` draws on `svg`, `content` says it, `render` sets it. Reading the records is all the input there is, so a
report can be written at any time, also of a study that is still running.
"""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.records import read_study


def write(study_folder: Path, out: Path) -> Path:
    """Write the report of a study, finished or not, into the folder `out`; returns its index.html. Raises UserError where there is no study."""
    from pipeline.report import blocks, content, render, svg

    study = read_study(study_folder)
    parts = content.sections(study)
    made = time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(study.record.created))
    subtitle = f"Study begun {made}. {len(study.trials)} trials, {len(study.confirmations)} confirmation windows."
    drawings = [block for part in parts for block in part.blocks if isinstance(block, blocks.Drawing)]
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for old in (out / "figures").glob("*.svg"):
        old.unlink()
    for drawing in drawings:
        _replace(out / "figures" / f"{drawing.name}.svg", svg.standalone(drawing.svg))
    _replace(out / "report.md", render.markdown(study.record.name, subtitle, parts))
    _replace(out / "index.html", render.html(study.record.name, subtitle, parts))
    return out / "index.html"


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
