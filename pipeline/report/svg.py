"""Small charts as plain SVG: a page of them weighs kilobytes where a charting library inlines megabytes, and works offline.

Colours come from classes, so one drawing serves light and dark pages; `data-tip` carries what a pointer over a mark shows. Axes,
marks and labels only: what to draw is `figures`' part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

STYLE = """
.plot{font:12px system-ui,sans-serif;--ink:#1d2530;--soft:#66707e;--grid:#e3e7ec;--paper:#fff;--base:#68778c;--win:#0b7a75;
--bad:#b45309;--fail:#c0262d;--dot:#4a7dc4}
@media(prefers-color-scheme:dark){.plot{--ink:#e7ebf0;--soft:#9aa5b3;--grid:#2c343f;--paper:#161b22;--base:#93a1b5;--win:#3cc2b8;
--bad:#f0a04b;--fail:#ff7b80;--dot:#7aa7e8}}
.plot text{fill:var(--soft);stroke:none}.plot .ink{fill:var(--ink)}.plot .name{fill:var(--ink);font-weight:600}
.plot .grid{stroke:var(--grid)}.plot .rule{stroke:var(--bad);stroke-dasharray:5 4}.plot .even{stroke:var(--soft);stroke-dasharray:2 3}
.plot .line{fill:none;stroke-width:2}.plot .thin{fill:none;stroke-width:1;opacity:.35}
.plot .base{stroke:var(--base);fill:var(--base)}.plot .win{stroke:var(--win);fill:var(--win)}.plot .dot{stroke:var(--dot);fill:var(--dot)}
.plot .bad{stroke:var(--bad);fill:var(--paper)}.plot .fail{stroke:var(--fail);fill:var(--fail)}.plot .line,.plot .thin{fill:none}
.plot .mark{stroke-width:1.6}.plot .mark:hover{stroke-width:4}.plot .whisker{stroke-width:1.6}
"""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear or logarithmic scale. `ticks` overrides the computed ones: (value, label)."""

    low: float
    high: float
    label: str = ""
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`; values outside are clipped to just beyond the edge."""
        low, high, value = (math.log(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        return min(1.02, max(-0.02, (value - low) / (high - low)))

    def marks(self) -> list[tuple[float, str]]:
        """Where the grid goes."""
        if self.ticks is not None:
            return list(self.ticks)
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            wide = math.log10(self.high / self.low)
            steps = (1,) if wide > 2.5 else (1, 2, 5) if wide > 0.6 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
            values = [step * 10.0**d for d in decades for step in steps]
            return [(v, short(v)) for v in values if self.low <= v <= self.high * (1 + 1e-9)]
        step = _nice((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        values = [i * step for i in range(first, first + 12) if i * step <= self.high + step * 1e-9]
        return [(v, short(v)) for v in values]


def around(values: Sequence[float], label: str, log: bool = False, zero: bool = False) -> Axis:
    """An axis that holds `values` with some room; logarithmic only where all are positive."""
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if log and low > 0:
        room = max(1.08, (high / low) ** 0.08)
        return Axis(low=low / room, high=high * room, label=label, log=True)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return Axis(low=0.0 if zero and low >= 0 else low - room, high=high + room, label=label)


def short(value: float) -> str:
    """Three significant digits, no exponent where it can be helped: '1,200', '0.02', '5e-04'."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.0e}"


@dataclass(kw_only=True)
class Plot:
    """One chart: add marks, then `svg()`."""

    title: str
    """Read aloud by screen readers and shown in none."""
    x: Axis
    y: Axis
    width: int = 760
    height: int = 320
    left: int = 64
    right: int = 20
    top: int = 14
    bottom: int = 42
    parts: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        inner_w, inner_h = self.width - self.left - self.right, self.height - self.top - self.bottom
        return round(self.left + self.x.place(x) * inner_w, 1), round(self.top + (1 - self.y.place(y)) * inner_h, 1)

    def point(self, x: float, y: float, look: str, tip: str, shape: str = "circle", size: float = 4.5) -> None:
        """A mark with a tip; shape is circle, diamond or cross."""
        px, py = self.at(x, y)
        common = f'class="mark {look}" data-tip="{escape(tip)}" tabindex="0"'
        if shape == "circle":
            self.parts.append(f'<circle cx="{px}" cy="{py}" r="{size}" {common}/>')
            return
        s = size * 1.3
        path = f"M{px - s} {py}L{px} {py - s}L{px + s} {py}L{px} {py + s}Z" if shape == "diamond" else _cross(px, py, size)
        self.parts.append(f'<path d="{path}" {common}/>')

    def line(self, xs: Sequence[float], ys: Sequence[float], look: str, thin: bool = False, steps: bool = False) -> None:
        """A polyline; `steps` keeps y until the next x."""
        pixels = [self.at(x, y) for x, y in zip(xs, ys, strict=True)]
        path = ""
        for i, (px, py) in enumerate(pixels):
            path += f"M{px} {py}" if not i else f"H{px}V{py}" if steps else f"L{px} {py}"
        self.parts.append(f'<path d="{path}" class="{look} {"thin" if thin else "line"}"/>')

    def whisker(self, low: float, high: float, y: float, look: str) -> None:
        """A horizontal interval."""
        (x0, py), (x1, _) = self.at(low, y), self.at(high, y)
        self.parts.append(f'<path d="M{x0} {py}H{x1}M{x0} {py - 4}V{py + 4}M{x1} {py - 4}V{py + 4}" class="whisker {look}"/>')

    def rule(self, *, x: float | None = None, y: float | None = None, look: str = "rule", text: str = "") -> None:
        """A line across the whole plot with a label at its end."""
        if x is not None:
            px, _ = self.at(x, self.y.low)
            self.parts.append(f'<path d="M{px} {self.top}V{self.height - self.bottom}" class="{look}"/>')
            self.parts.append(f'<text x="{px + 4}" y="{self.top + 10}">{escape(text)}</text>')
        if y is not None:
            _, py = self.at(self.x.low, y)
            self.parts.append(f'<path d="M{self.left} {py}H{self.width - self.right}" class="{look}"/>')
            self.parts.append(f'<text x="{self.width - self.right}" y="{py - 5}" text-anchor="end">{escape(text)}</text>')

    def text(self, x: float, y: float, text: str, dx: float = 8, dy: float = -7, anchor: str = "start", look: str = "name") -> None:
        """A label beside a point."""
        px, py = self.at(x, y)
        self.parts.append(f'<text x="{px + dx}" y="{py + dy}" text-anchor="{anchor}" class="{look}">{escape(text)}</text>')

    def svg(self) -> str:
        """The whole drawing."""
        right, bottom, frame = self.width - self.right, self.height - self.bottom, []
        for value, label in self.x.marks():
            px, _ = self.at(value, self.y.low)
            frame.append(
                f'<path d="M{px} {self.top}V{bottom}" class="grid"/><text x="{px}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>'
            )
        for value, label in self.y.marks():
            _, py = self.at(self.x.low, value)
            frame.append(
                f'<path d="M{self.left} {py}H{right}" class="grid"/><text x="{self.left - 8}" y="{py + 4}" text-anchor="end">{escape(label)}</text>'
            )
        middle = (self.top + bottom) / 2
        frame.append(f'<text x="{(self.left + right) / 2}" y="{self.height - 6}" text-anchor="middle">{escape(self.x.label)}</text>')
        if self.y.label:
            frame.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(self.y.label)}</text>')
        body = "".join(frame) + "".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self.title)}">{body}</svg>'
        )


def standalone(svg: str) -> str:
    """The drawing as a file of its own, with its style."""
    start = svg.index(">") + 1
    return f"{svg[:start]}<style>{STYLE}</style>{svg[start:]}"


def _cross(px: float, py: float, size: float) -> str:
    return f"M{px - size} {py - size}L{px + size} {py + size}M{px - size} {py + size}L{px + size} {py - size}"


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return float(next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * 0.999))
