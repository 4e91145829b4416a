"""A report as blocks, and its two forms: Markdown, and HTML that needs no other file.

Every string is escaped. What the paper printed and what was measured here look different.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Origin = Literal["paper", "measured here"]
DASH = "-"


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Some sentences."""

    text: str


@dataclass(frozen=True)
class Listing:
    """A list of lines."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of one origin only.

    Args:
        origin: whose values these are; said above the table and in each row's first cell.
        headers: of the columns, without that of the origin.
        rows: None stands for a missing value, shown as a dash.
        left: so many columns are aligned left.
        caption: what else to say above.
    """

    origin: Origin
    headers: Sequence[str]
    rows: Sequence[Sequence[str | None]]
    left: int = 2
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture that lies in a folder beside the report.

    Args:
        path: of the PNG, relative to the report; the SVG lies beside it.
        text: what it shows.
    """

    path: str
    text: str


Block = Heading | Paragraph | Listing | Table | Picture


def to_markdown(blocks: Sequence[Block]) -> str:
    """Returns the report as Markdown; pictures are linked."""
    return "\n\n".join(_markdown(each) for each in blocks) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_escaped(block.text)}"
    if isinstance(block, Paragraph):
        return _escaped(block.text)
    if isinstance(block, Listing):
        return "\n".join(f"- {_escaped(each)}" for each in block.items)
    if isinstance(block, Picture):
        svg = block.path.removesuffix(".png") + ".svg"
        text = _escaped(block.text)
        return f"![{text}]({block.path})\n\n{text} ([SVG]({svg}))"
    heads = [block.origin, *block.headers]
    rules = ["---" if at < block.left + 1 else "---:" for at in range(len(heads))]
    rows = [[block.origin, *row] for row in block.rows]
    lines = [_line([_escaped(each) for each in heads]), _line(rules)]
    lines += [_line([_escaped(DASH if each is None else each) for each in row]) for row in rows]
    who = f"**{_title(block.origin)}**"
    caption = f"{who}: {_escaped(block.caption)}" if block.caption else who
    return "\n".join([caption, "", *lines])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Returns the text with nothing in it that Markdown, or the HTML within it, would act on."""
    plain = " ".join(_valid(text).split())
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~!$])", r"\\\1", plain)


def _valid(text: str) -> str:
    """A file name need not be valid text: its bytes are written out."""
    return text.encode(errors="backslashreplace").decode()


def _title(origin: Origin) -> str:
    return "Paper, as printed" if origin == "paper" else "Measured here"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e5e5e5; }
th.left, td.left { text-align: left; }
table.paper { background: #f6f6f4; color: #555; font-style: italic; }
table.measured caption, table.measured td:first-child { color: #1a7f37; }
table.measured { border-left: 4px solid #1a7f37; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; }
li { overflow-wrap: anywhere; }
"""


def to_html(blocks: Sequence[Block], folder: Path) -> str:
    """Returns the report as one HTML page with its pictures inside.

    Args:
        blocks: of the report.
        folder: where its pictures lie.
    """
    title = next((each.text for each in blocks if isinstance(each, Heading)), "report")
    body = "\n".join(_html(each, folder) for each in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_safe(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{_safe(block.text)}</p>"
    if isinstance(block, Listing):
        items = "\n".join(f"<li>{_safe(each)}</li>" for each in block.items)
        return f"<ul>\n{items}\n</ul>"
    if isinstance(block, Picture):
        data = base64.b64encode((folder / block.path).read_bytes()).decode()
        image = f'<img alt="{_safe(block.text)}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{_safe(block.text)}</figcaption></figure>"
    kind = "paper" if block.origin == "paper" else "measured"
    caption = _title(block.origin) + (f": {block.caption}" if block.caption else "")
    heads = _cells("th", [block.origin, *block.headers], block.left + 1)
    rows = [_cells("td", [block.origin, *row], block.left + 1) for row in block.rows]
    lines = "\n".join(f"<tr>{each}</tr>" for each in rows)
    return (
        f'<div class="scroll"><table class="{kind}">\n<caption>{_safe(caption)}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


def _cells(tag: str, cells: Sequence[str | None], left: int) -> str:
    return "".join(
        f"<{tag}{' class=' + chr(34) + 'left' + chr(34) if at < left else ''}>"
        f"{_safe(DASH if cell is None else cell)}</{tag}>"
        for at, cell in enumerate(cells)
    )


def _safe(text: str) -> str:
    return html.escape(_valid(text))
