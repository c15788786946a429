"""Blocks to a self-contained page and to Markdown. Nothing is fetched: style, script and drawings are in the page."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from pipeline.report import svg
from pipeline.report.blocks import Block, Code, Drawing, Section, Table, Text, Tiles


def html(title: str, subtitle: str, sections: list[Section]) -> str:
    """The page."""
    here = files("pipeline.report")
    style = (here / "style.css").read_text(encoding="utf-8") + svg.STYLE
    script = (here / "script.js").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{_anchor(s.title)}">{escape(s.title)}</a>' for s in sections)
    body = "".join(f'<section id="{_anchor(s.title)}"><h2>{escape(s.title)}</h2>{_blocks(s.blocks)}</section>' for s in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{escape(title)}</title><style>{style}</style></head><body><header><p class="over">MTGR Autotune</p><h1>{escape(title)}</h1>'
        f'<p class="sub">{escape(subtitle)}</p><nav>{links}</nav></header><main>{body}</main><div id="tip" role="status"></div>'
        f"<script>{script}</script></body></html>\n"
    )


def markdown(title: str, subtitle: str, sections: list[Section]) -> str:
    """The same content for a terminal, a pull request or a wiki; drawings are linked as files."""
    lines = [f"# {title}", "", subtitle, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*_markdown_block(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def _blocks(blocks: tuple[Block, ...]) -> str:
    """Small drawings that follow each other share a grid."""
    out, grid = [], False
    for block in blocks:
        small = isinstance(block, Drawing) and block.small
        if small != grid:
            out.append('<div class="grid-of">' if small else "</div>")
            grid = small
        out.append(_block(block))
    return "".join(out) + ("</div>" if grid else "")


def _block(block: Block) -> str:
    match block:
        case Text():
            return f'<p class="verdict">{escape(block.text)}</p>' if block.strong else f"<p>{escape(block.text)}</p>"
        case Code():
            return f"<pre><code>{escape(block.text)}</code></pre>"
        case Drawing():
            return f"<figure>{block.svg}<figcaption>{escape(block.caption)}</figcaption></figure>"
        case Tiles():
            cells = (
                f'<div><span>{escape(a)}</span><strong>{escape(b)}</strong><span class="note">{escape(c)}</span></div>' for a, b, c in block.tiles
            )
            return f'<div class="tiles">{"".join(cells)}</div>'
        case Table():
            head = "".join(f"<th{_number_class(i, block)}>{escape(cell)}</th>" for i, cell in enumerate(block.header))
            rows = "".join(
                "<tr>" + "".join(f"<td{_number_class(i, block)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in block.rows
            )
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _number_class(column: int, table: Table) -> str:
    return ' class="n"' if column >= table.left else ""


def _markdown_block(block: Block) -> list[str]:
    match block:
        case Text():
            return [f"**{block.text}**" if block.strong else block.text]
        case Code():
            return ["```", block.text, "```"]
        case Drawing():
            return [f"![{block.caption}](figures/{block.name}.svg)"]
        case Tiles():
            return [f"- {label}: **{value}**" + (f" ({note})" if note else "") for label, value, note in block.tiles]
        case Table():
            rule = ["---" if i < block.left else "---:" for i in range(len(block.header))]
            return [_row(block.header), _row(rule), *map(_row, block.rows)]


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())
