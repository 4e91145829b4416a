"""Several labels per image (multi-label data): which data has them, and how cells are split.

Cells are "cat|dog", lists, or columns of 0 and 1. The labels of such a source are multi-hot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from allmlp.data.classes import RawLabels
from allmlp.data.source import Source
from allmlp.errors import UserError, one_of

MARK = "|"
_SEPARATORS = {"space": None, "comma": ",", "semicolon": ";", "tab": "\t"}
_ZERO_ONE = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def split_labels(
    splits: Mapping[str, RawLabels], options: Mapping[str, str], name: str
) -> tuple[dict[str, RawLabels], str | None]:
    """Returns the labels, with their cells split if any split has several labels per image.

    That is so for lists, columns of 0 and 1 of which a row has none or several, and text with a
    "|" between labels; `options` (`labels`, `separator`) decide otherwise. Also returns a note.
    """
    asked, separator = options.get("labels"), options.get("separator")
    if asked is not None:
        one_of("labels", asked, ("single", "multi"), where=name)
    if asked == "single" and separator is not None:
        what = f"labels=single with separator={separator}: one label is not separated"
        raise UserError(what, where=name, fix="Leave out one of them", code="conflict")
    cells = [value for raw in splits.values() if not raw.are_classes for value in raw.values]
    lists = [cell for cell in cells if isinstance(cell, list | tuple)]
    is_one_hot = any(raw.class_names is not None for raw in splits.values())
    at_most_one = all(len(cell) == 1 for cell in lists)
    if asked == "single" or (asked is None and is_one_hot and at_most_one):
        return {split: _one(raw, name) for split, raw in splits.items()}, None
    mark = _SEPARATORS.get(separator, separator) if separator else MARK
    marked = (text for text in cells if isinstance(text, str) and _is_marked(text))
    example = lists[0] if lists else next(marked, None)
    if example is None and asked is None and separator is None:
        return dict(splits), None
    shown = "" if example is None else f", such as {_shown(example)}"
    other = f"; if each has one, with {MARK} in its name: '{name}#labels=single'"
    note = f"multi-label: images have several labels{shown}"
    note += other if example is not None and not lists and asked is separator is None else ""
    parts = {split: _several(raw, mark, bool(lists)) for split, raw in splits.items()}
    return parts, note


def _is_marked(text: str) -> bool:
    return sum(bool(part.strip()) for part in text.split(MARK)) > 1


def _shown(cell: Any) -> str:
    text = repr(cell) if isinstance(cell, str) else "[" + ", ".join(map(str, cell)) + "]"
    return text if len(text) <= 60 else text[:57] + "..."


def _one(raw: RawLabels, name: str) -> RawLabels:
    """One label per image, from cells that may be lists."""
    if raw.are_classes:
        return raw
    for cell in raw.values:
        if isinstance(cell, list | tuple) and len(cell) != 1:
            what = f"labels=single, and an image has {len(cell)} labels: {_shown(cell)}"
            raise UserError(what, where=name, fix="labels=multi, or correct the data")
    values = [cell[0] if isinstance(cell, list | tuple) else cell for cell in raw.values]
    return replace(raw, values=values, class_names=None)


def _several(raw: RawLabels, mark: str | None, are_lists: bool) -> RawLabels:
    if raw.are_classes:
        return raw
    values = [_parts(cell, mark, are_lists) for cell in raw.values]
    return replace(raw, values=values, several=True)


def _parts(cell: object, mark: str | None, are_lists: bool) -> tuple[object, ...]:
    """The labels of one cell; none for an empty one."""
    if isinstance(cell, list | tuple):
        return tuple(cell)
    if cell is None or str(cell).strip().casefold() in ("", "nan", "<na>"):
        return ()
    return tuple(cell.split(mark)) if isinstance(cell, str) and not are_lists else (cell,)


def one_hot_cell(cells: Mapping[str, object]) -> tuple[str, ...]:
    """Returns the names of the columns with a 1; ValueError names the first that is not 0 or 1."""
    found = []
    for column, cell in cells.items():
        value = _ZERO_ONE.get(str(cell).strip().casefold())
        if value is None:
            raise ValueError(f"column {column!r} has {str(cell)[:40]!r}, not 0 or 1")
        found += [column] if value else []
    return tuple(found)


def as_multi_label(source: Source) -> Source:
    """Returns the source with multi-hot labels."""
    if source.is_multi_label:
        return source
    return replace(source, labels=np.eye(len(source.class_names), dtype=bool)[source.labels])


def check_one_label(sources: Iterable[Source], what: str) -> None:
    """Raises UserError if images have several labels, which `what` cannot use."""
    for source in sources:
        if source.is_multi_label:
            fix = f"If each image has one, with {MARK} in its name: SOURCE#labels=single"
            what = f"{what} needs one label per image; {source.name} has several"
            raise UserError(what, where=source.name, fix=fix, code="multi-label")
