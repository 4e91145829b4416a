"""Lists of images: a CSV (.tsv, .txt) or JSONL file with a path and optionally a label per row.

Columns are found by name; paths are relative to the list's folder.
"""

from __future__ import annotations

import csv
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np

from allmlp.data.classes import numbered
from allmlp.data.source import GROUP, ImageFiles, PackedStrings, Source
from allmlp.data.source_spec import LABEL_OPTIONS, Kind, Records, SourceSpec
from allmlp.data.sources.columns import LABEL_COLUMNS, Rows, choose_column, open_rows
from allmlp.errors import UserError, plural
from allmlp.io import parse_json

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "img")
_EXAMPLE = "Begin the list with a header such as path,label (or path,label,split)"
_NO_NAME = "[\ud800-\udc7f\udd00-\udfff]"  # surrogates other than those of undecodable bytes
_FIX_CSV = 'Correct the line; put a field with a comma or a quote in quotes: "a, b"'
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
        what = f"none of the listed images exists, such as {paths[0]!r}"
        fix = "Write file names with their endings, relative to the list's own folder"
        raise UserError(what, where=images.item_name(0), fix=fix)
    rows = Rows(
        *(images, column, names, lambda name: numbered(columns[name])),
        [name for name in names if name.casefold() in LABEL_COLUMNS],
        *(where, path),
        may_be_hot=True,
    )
    found = open_rows(spec, rows, labels)
    if labels:
        for split, number in _check_repeats(found, paths, path.parent, where).items():
            if GROUP in spec.options:  # which may keep them together
                continue
            note = f"an image is there twice in {plural(number, 'row')} of {path.name}: holdouts "
            note += "and folds may have it on both sides"
            found[split] = replace(found[split], notes=(*found[split].notes, note))
    return found


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


def _check_repeats(
    splits: dict[str, Records], paths: PackedStrings, folder: Path, where: Callable[[int], str]
) -> Counter[str]:
    """Returns repeated rows by split; UserError if an image is in two splits or has two labels."""
    repeated: Counter[str] = Counter()
    real_folder = functools.cache(lambda name: os.path.realpath(folder / name))
    seen: dict[int, tuple[int, str, str]] = {}  # hash of the path: first row, its split and label
    for split, records in splits.items():
        assert isinstance(records.images, Source)
        assert records.labels is not None
        labels = [str(value) for value in records.labels.values]
        codes = records.labels.codes.tolist()
        for row, code in zip(records.images.indices.tolist(), codes, strict=True):
            head, _, name = paths[row].replace(os.sep, "/").rpartition("/")
            real = f"{real_folder(head + '/' if paths[row][0] == '/' else head)}/{name}"
            own = row, split, labels[code]
            known = seen.setdefault(hash(real), own)
            repeated[split] += known[0] != row
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
    return +repeated


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        is_utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    # File names need not be UTF-8; surrogateescape preserves them.
    encoding, errors = ("utf-16", "replace") if is_utf16 else ("utf-8-sig", "surrogateescape")
    return path.open(encoding=encoding, errors=errors, newline="")


def _read_csv(file: TextIO, path: Path) -> tuple[list[int], _Columns]:
    """Returns the line number of every row, and the columns."""

    def mistake(what: str, line: int, fix: str = _FIX_CSV) -> UserError:
        return UserError(what, where=f"{path}, line {line}", fix=fix)

    first = file.readline()
    separator = re.fullmatch(r'"?sep=(.)"?\s*', first)  # of some Excel exports
    file.seek(0)
    delimiter = separator[1] if separator else max(",;\t", key=first.count)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise mistake(f"not CSV: {error}", reader.line_num) from error
    header, *rows = rows[1 if separator else 0 :] or [(1, [])]
    names = [cell.strip() for cell in header[1]]
    if len(set(names)) < len(names):
        raise mistake(f"two columns have the same name: {names}", header[0], "Rename or remove one")
    for line, cells in rows:
        if len(cells) != len(names):
            raise mistake(f"{len(cells)} fields, and the header has {len(names)}", line)
    columns = zip(*(cells for _, cells in rows), strict=True)
    return [line for line, _ in rows], dict(zip(names, map(list, columns), strict=False))


def _read_jsonl(file: TextIO, path: Path) -> tuple[list[int], _Columns]:
    """Like `_read_csv`; what a row lacks is None."""
    lines: list[int] = []
    columns: _Columns = {}
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = parse_json(text)
            if not isinstance(row, dict):
                raise ValueError("no object")
        except ValueError as error:
            what = f"not a JSON object: {str(error).partition(':')[0]}"
            fix = 'Every line is an object: {"path": "a.jpg", "label": "cat"}'
            raise UserError(what, where=f"{path}, line {line}", fix=fix) from error
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
