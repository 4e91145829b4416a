"""Web pages of one file: they open without a network, with figures inside and all text escaped."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

_TEMPLATE = files("allmlp").joinpath("page.html")
_NUMBER = re.compile(r"[\d.,]+%?")


def page(title: str, parts: Iterable[str]) -> bytes:
    template = Template(_TEMPLATE.read_text("utf-8"))
    return template.substitute(title=safe(title), body="\n".join(parts)).encode()


def safe(text: object, *, quote: bool = False) -> str:
    """Escapes text; bytes of file names that are not valid text are shown as such."""
    return html.escape(str(text).encode(errors="backslashreplace").decode(), quote=quote)


def tag(name: str, text: object, style: str = "") -> str:
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
    data = content if isinstance(content, bytes) else content.read_bytes()
    return f'<img src="{data_url(data, kind)}" alt="{safe(described, quote=True)}">'


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def details(title: str, body: str) -> str:
    return f"<details><summary>{safe(title)}</summary>{body}</details>"
