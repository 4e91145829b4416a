"""Lists of images: a CSV (.tsv, .txt) or JSONL file with a path and optionally a label per row.

Columns are found by name; paths are relative to the list's folder.
"""

from __future__ import annotations

import csv
import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np

from allmlp.data import image
from allmlp.data.classes import numbered
from allmlp.data.source import GROUP, ImageFiles, PackedStrings, Source
from allmlp.data.source_spec import LABEL_OPTIONS, Kind, Records, SourceSpec
from allmlp.data.sources.columns import LABEL_COLUMNS, Rows, choose_column, open_rows
from allmlp.errors import UserError
from allmlp.io import parse_json

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "img")
_EXAMPLE = "Begin the list with a header such as path,label (or path,label,split)"
_OBJECT = 'Every line is an object: {"path": "a.jpg", "label": "cat"}'
_NO_NAME = "[\ud800-\udc7f\udd00-\udfff]"  # surrogates other than those of undecodable bytes
_Columns = dict[str, list[object]]


def open_list(spec: SourceSpec, labels: bool) -> dict[str, Records]:
    """Returns the splits of a list; without a column of splits everything is train."""
    path = spec.path
    with _open(path) as file:
        read = _read_jsonl if path.suffix.lower() == ".jsonl" else _read_csv
        lines, columns = read(file, path)
    if not lines:
        raise UserError("the list has no rows", where=path, fix=_EXAMPLE)

    def where(row: int) -> str:
        return f"{path}, line {lines[row]}"

    names = list(columns)
    likely = [name for name in names if name.casefold() in IMAGE_COLUMNS]
    column = choose_column("image", spec, names, likely, path)
    paths = PackedStrings(_paths(columns[column], path.parent, where))
    images = ImageFiles(paths, "" if str(path.parent) == "." else str(path.parent))
    some = np.unique(np.linspace(0, len(images) - 1, num=20).astype(np.int64)).tolist()
    if not any(os.path.lexists(images.item_name(at)) for at in some):
        what = f"the list's images are not there: {paths[0]!r}"
        fix = "Write file names with their endings, relative to the list's own folder"
        raise UserError(what, where=images.item_name(0), fix=fix)
    rows = Rows(
        *(images, column, names, lambda name: numbered(columns[name])),
        [name for name in names if name.casefold() in LABEL_COLUMNS],
        *(where, path),
        may_be_hot=True,
    )
    found = open_rows(spec, rows, labels)
    notes = _notes_on_repeats(found, paths, path.parent, where) if labels else ()
    return {split: replace(own, notes=(*own.notes, *notes)) for split, own in found.items()}


def _paths(cells: list[object], folder: Path, where: Callable[[int], str]) -> Iterator[str]:
    from_windows = None
    for row, path in enumerate(cells):
        if not isinstance(path, str):
            what = f"the path must be text, got {path!r}"
            raise UserError(what, where=where(row), fix="Correct the line")
        if not path.strip() or "\0" in path or re.search(_NO_NAME, path):
            what = f"not the name of a file: {path!r}" if path.strip() else "the path is empty"
            raise UserError(what, where=where(row), fix="Correct or remove the line")
        if "\\" in path and from_windows is None:  # file names may contain backslashes
            from_windows = not os.path.lexists(folder / path)
        yield path.replace("\\", "/") if from_windows else path


def _notes_on_repeats(
    splits: dict[str, Records], paths: PackedStrings, folder: Path, where: Callable[[int], str]
) -> tuple[str, ...]:
    """Returns a note on images in several rows; in two splits or with two labels is an error."""
    real_folder = functools.cache(lambda name: os.path.realpath(folder / name))

    def real(path: str) -> str:
        head, _, name = path.replace(os.sep, "/").rpartition("/")
        return f"{real_folder(head + '/' if path[0] == '/' else head)}/{name}"

    seen: dict[int, tuple[int, str, str]] = {}  # hash of the path: first row, its split and label
    again: list[tuple[int, int]] = []
    for split, records in splits.items():
        assert isinstance(records.images, Source)
        assert records.labels is not None
        labels = [str(value) for value in records.labels.values]
        codes = records.labels.codes.tolist()
        for row, code in zip(records.images.indices.tolist(), codes, strict=True):
            own = row, split, labels[code]
            known = seen.setdefault(hash(real(paths[row])), own)
            if known is own:
                continue
            again.append((known[0], row))
            for at, what, fix in (
                (1, "an image is in two splits", ""),
                (2, "an image has two labels", ", or write them as one: cat|dog"),
            ):
                if known[at] != own[at]:
                    one, other = sorted((known, own))
                    what += f": {one[at]!r} (line {where(one[0]).rpartition(' ')[2]}) and"
                    what += f" {other[at]!r}: {paths[row]!r}"
                    fix = f"Keep one of the two lines{fix}"
                    raise UserError(what, where=where(other[0]), fix=fix)
    if not again:
        return ()
    first, second = (where(row).rpartition(" ")[2] for row in again[0])
    note = f"{len(again):,} rows name an image again, such as lines {first} and {second}: it counts"
    return (f"{note} twice, and if validation is held out of train it may be in both",)


def _open(path: Path) -> TextIO:
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError("the list is UTF-16 text", where=path, fix="Save it as UTF-8")
        # File names need not be UTF-8; surrogateescape preserves them.
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise UserError(f"cannot read the list: {error.strerror}", where=path) from error


def _read_csv(file: TextIO, path: Path) -> tuple[list[int], _Columns]:
    """Returns the line number of every row, and the columns."""
    header = file.readline()
    separator = re.fullmatch(r'"?sep=(.)"?\s*', header)  # first line of some Excel exports
    if not separator:
        file.seek(0)
    skipped = int(separator is not None)
    delimiter = separator[1] if separator else max(",;\t", key=header.count)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    names: list[str] = []
    lines: list[int] = []
    columns: list[list[object]] = []
    try:
        for cells in filter(None, reader):
            line = reader.line_num + skipped
            where = f"{path}, line {line}"
            if not names:
                names = [cell.strip() for cell in cells]
                columns = [[] for _ in names]
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice is not None:
                    what = f"two columns have the same name: {twice!r}"
                    raise UserError(what, where=where, fix="Rename or remove one")
                words = (word.lower() for name in names for word in name.split())
                if any(word.endswith(image.SUFFIXES) for word in words):
                    what = f"the list has no header; its first line is {header.strip()[:80]!r}"
                    fix = f"{_EXAMPLE}. Paths alone: mixer predict MODEL - < {path}"
                    raise UserError(what, where=where, fix=fix)
                continue
            if len(cells) != len(names):
                what = f"{len(cells)} fields, and the header has {len(names)}"
                fix = "Correct the line; put a field with a comma in quotes"
                raise UserError(what, where=where, fix=fix)
            lines.append(line)
            for column, cell in zip(columns, cells, strict=True):
                column.append(cell)
    except csv.Error as error:
        fix = 'Put a field with a comma or a quote in quotes: "a, ""b"""'
        where = f"{path}, line {reader.line_num + skipped}"
        raise UserError(f"not CSV: {error}", where=where, fix=fix) from error
    return lines, dict(zip(names, columns, strict=True))


def _read_jsonl(file: TextIO, path: Path) -> tuple[list[int], _Columns]:
    """Like `_read_csv`; what a row lacks is None."""
    lines: list[int] = []
    columns: _Columns = {}
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        where = f"{path}, line {line}"
        try:
            row = parse_json(text)
        except ValueError as error:
            reason = str(error).partition(":")[0]
            raise UserError(f"not JSON: {reason}", where=where, fix=_OBJECT) from error
        if not isinstance(row, dict):
            what = f"not a JSON object: {text.strip()[:80]}"
            raise UserError(what, where=where, fix=_OBJECT)
        for name in row:
            columns.setdefault(name, [None] * len(lines))
        for name, column in columns.items():
            column.append(row.get(name))
        lines.append(line)
    return lines, columns


KIND = Kind(
    "lists",
    lambda spec: spec.path.is_file() and spec.path.suffix.lower() in SUFFIXES,
    open_list,
    (*LABEL_OPTIONS, "image", GROUP),
)
