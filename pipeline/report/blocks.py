"""What a report is made of: paragraphs, tables, drawings, tiles. `render` knows how each looks, the makers of content only what is in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph; `strong` makes it the page's headline."""

    text: str
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns beyond the first `left` ones hold numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """An SVG; `name` becomes its file."""

    name: str
    svg: str
    caption: str
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Code:
    """Something to copy into a terminal."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Headline figures: label, value, note."""

    tiles: tuple[tuple[str, str, str], ...]


Block = Text | Table | Drawing | Code | Tiles


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: tuple[Block, ...]
