"""Web pages of one file: they open without a network, with figures inside and all text escaped."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1a7f37; --bad: #cf222e; }}
@media (prefers-color-scheme: dark) {{ :root {{ --good: #3fb950; --bad: #ff7b72; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }}
td, th {{ padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: normal; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.large {{ font-size: 1.6rem; font-weight: 600; color: var(--good); margin: .2rem 0; }}
.warning {{ border-left: 4px solid var(--bad); padding-left: .8rem; list-style: none; }}
.paper {{ font-style: italic; }} .measured {{ border-left: 4px solid var(--good); }}
img {{ max-width: 100%; height: auto; background: #fff; border-radius: 4px; }}
pre {{ background: var(--soft); padding: .7rem; border-radius: 4px; overflow-x: auto; }}
.images {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }}
.images figure {{ margin: 0; font-size: .85rem; }} .images b {{ color: var(--bad); }}
.images img {{ display: block; width: 100%; height: 9rem; object-fit: contain;
  background: var(--soft); }}
summary {{ cursor: pointer; margin: 1rem 0; }}
</style></head><body>
{body}
</body></html>
"""


_NUMBER = re.compile(r"[\d.,]+%?")


def page(title: str, parts: Iterable[str]) -> bytes:
    """Returns a page of parts, which are HTML already."""
    return _TEMPLATE.format(title=safe(title), body="\n".join(parts)).encode()


def safe(text: object, *, quote: bool = False) -> str:
    """Escapes text; bytes of file names that are not valid text are shown as such."""
    return html.escape(str(text).encode(errors="backslashreplace").decode(), quote=quote)


def tag(name: str, text: object, style: str = "") -> str:
    """Returns an element with this text."""
    return f"<{name}{f' class={style}' if style else ''}>{safe(text)}</{name}>"


def items(texts: Iterable[str], style: str = "") -> str:
    body = "".join(tag("li", text) for text in texts)
    return f"<ul{f' class={style}' if style else ''}>{body}</ul>" if body else ""


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), style: str = "") -> str:
    """Returns a table; cells of digits are aligned as numbers."""
    lines = ["".join(tag("th", cell) for cell in head)] if head else []
    for row in rows:
        cells = (tag("td", cell, "number" if _NUMBER.fullmatch(cell) else "") for cell in row)
        lines.append("".join(cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table{f' class={style}' if style else ''}>{body}</table>"


def image(content: Path | bytes, described: str, kind: str = "png") -> str:
    """Returns an image with its bytes inside."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    return f'<img src="{data_url(data, kind)}" alt="{safe(described, quote=True)}">'


def data_url(content: bytes, kind: str = "png") -> str:
    """Returns a URL that is the encoded image itself."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def details(title: str, body: str) -> str:
    """Returns a part that is folded until it is clicked."""
    return f"<details><summary>{safe(title)}</summary>{body}</details>"
