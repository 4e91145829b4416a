"""Lists of images: a CSV (.tsv, .txt) or JSONL file with a path and optionally a label per row.

Columns are found by name; paths are relative to the list's folder.
"""

from __future__ import annotations

import csv
import functools
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from allmlp.data import image
from allmlp.data.classes import Cells, RawLabels
from allmlp.data.multi_label import one_hot_cell
from allmlp.data.source import ImageFiles, PackedStrings, Source
from allmlp.data.source_spec import (
    FOLD,
    GROUP,
    LABEL_OPTIONS,
    SPLITS,
    Kind,
    Records,
    Roles,
    SourceSpec,
    choose_column,
    choose_labels,
)
from allmlp.errors import UserError
from allmlp.io import parse_json

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "img")
LABEL_COLUMNS = ("label", "class", "target")
# Columns that users may expect to be used.
_SPLITS_OR_GROUPS = (
    r"(?i)(?<![a-z])(is_?)?(val|valid|validation|test|train|training|holdout|set|subset|partition|phase"
    r"|folds?|groups?|patients?|subjects?|persons?|video|clip|sequence|session|site|slide|study)"
    r"[-_ ]?(id|no|nr|num|number|name|idx|index)?(?![a-z])"
)
_EXAMPLE = "Begin the list with a header such as path,label (or path,label,split)"
_OBJECT = 'Every line is an object: {"path": "a.jpg", "label": "cat"}'
_Rows = Iterator[tuple[int, dict[str, object]]]  # line number and cells


def open_list(spec: SourceSpec, labels: bool) -> dict[str, Records]:
    """Returns the splits of a list; without a `split` column everything is train."""
    path = spec.path
    with _open(path) as file:
        rows = (_jsonl_rows if path.suffix.lower() == ".jsonl" else _csv_rows)(file, path)
        first = next(rows, None)
        if first is None:
            raise UserError("the list has no rows", where=path, fix=_EXAMPLE)
        table = _Table(spec, list(first[1]), labels)
        paths = PackedStrings(table.read(chain([first], rows)))
    columns = {role: PackedStrings(cells) for role, cells in table.cells_of.items()}
    images = ListedFiles(paths, "" if str(path.parent) == "." else str(path.parent), columns)
    _check_some_exist(images, path)
    notes = tuple(table.notes(paths)) if labels else ()
    found: dict[str, Records] = {}
    for number, split in enumerate(SPLITS):
        at = np.flatnonzero(np.asarray(table.splits) == number)
        if len(at):
            own = Source(split, [], at, images, at)  # labels are added later
            found[split] = Records(own, table.raw_labels(at) if labels else None, notes)
    return found


@dataclass(frozen=True)
class ListedFiles(ImageFiles):
    """Image files with their groups and folds."""

    columns: Mapping[str, PackedStrings] = field(default_factory=dict)  # by role

    def values_of(self, column: str) -> list[Any] | None:
        """Returns the group or fold of every image; None if the list has none."""
        return list(self.columns[column]) if column in self.columns else None


class _Table:
    """Reads the rows of a list: line, split and label."""

    def __init__(self, spec: SourceSpec, columns: list[str], labels: bool) -> None:
        self.path = spec.path
        images = [name for name in columns if name.casefold() in IMAGE_COLUMNS]
        self.image = choose_column("image", spec, columns, images, (), self.path)
        rest = [name for name in columns if name != self.image]
        self.roles = Roles.find(spec, rest, self.path)
        roles = {GROUP: self.roles.group, FOLD: self.roles.fold} if labels else {}
        self._columns = {role: name for role, name in roles.items() if name is not None}
        self.cells_of: dict[str, list[str]] = {role: [] for role in self._columns}
        used = {self.roles.split, *self._columns.values()}
        rest = [name for name in rest if name not in used]
        self.label: str | list[str] | None = None
        if labels:
            known = [name for name in rest if name.casefold() in LABEL_COLUMNS]
            preferred = [name for name in known if name.casefold() == "label"]
            known = known or [name for name in rest if name.casefold() == "labels"]
            others = [name for name in rest if not re.search(_SPLITS_OR_GROUPS, name)]
            # Columns of 0 and 1, which the rows confirm.
            self.is_guess = not known and "label" not in spec.options and len(others) > 1
            self.label = others if self.is_guess else None
            self.label = self.label or choose_labels(spec, columns, known, preferred[:1], self.path)
        chosen = self.label if isinstance(self.label, list) else [self.label]
        rest = [name for name in rest if name not in chosen]
        self.unused = [name for name in rest if re.search(_SPLITS_OR_GROUPS, name)]
        self.lines, self.splits, self.codes = array("q"), array("b"), array("q")
        self.files = array("q")  # hashes of the resolved image paths
        self.cells = Cells()
        self._folder = functools.cache(lambda name: os.path.realpath(self.path.parent / name))

    def read(self, rows: _Rows) -> Iterator[str]:
        """Yields the path of every row."""
        splits, from_windows = list(SPLITS), None
        for line, row in rows:
            path = self._text(row, self.image, "path", line)
            if "\0" in path or re.search("[\ud800-\udc7f\udd00-\udfff]", path):
                raise self._error(f"not the name of a file: {path!r}", line)
            if "\\" in path:
                if from_windows is None:  # file names may contain backslashes
                    from_windows = not os.path.lexists(self.path.parent / path)
                path = path.replace("\\", "/") if from_windows else path
            split = "train"
            if self.roles.split is not None:
                text = self._cell(row, self.roles.split, "split", line)
                split = self.roles.split_of(text)
                if split is None:
                    fix = f"Known: {', '.join(splits)}; in a column is_valid: true, false"
                    raise self._error(f"unknown split {text!r}", line, fix)
            for role, column in self._columns.items():
                self.cells_of[role].append(self._cell(row, column, role, line))
            if self.label is not None:
                self.codes.append(self.cells.code(self._label(row, line)))
                self.files.append(hash(self._real(path)))
            self.splits.append(splits.index(split))
            self.lines.append(line)
            yield path

    def raw_labels(self, rows: np.ndarray) -> RawLabels:
        """Returns the labels of some rows."""
        lines = np.asarray(self.lines)[rows]
        return RawLabels(
            np.asarray(self.codes)[rows],
            self.cells.values,
            class_names=self.label if isinstance(self.label, list) else None,
            where=lambda at: f"{self.path}, line {lines[at]}",
        )

    def notes(self, paths: PackedStrings) -> Iterator[str]:
        """Yields notes on unused columns and on images in several rows.

        Rows for one image in different splits, or with different labels, are an error.
        """
        yield from self.roles.notes()
        if self.unused:
            why = "a column split or is_valid makes splits, #group=COLUMN keeps groups together"
            yield f"columns that are not used: {', '.join(self.unused)} ({why})"
        files, lines = np.asarray(self.files), self.lines
        order = np.argsort(files, kind="stable")
        same = np.flatnonzero(np.diff(files[order]) == 0)
        pairs = zip(order[same].tolist(), order[same + 1].tolist(), strict=True)
        for first, second in sorted(pairs, key=lambda pair: pair[1]):
            rows = first, second
            if self._real(paths[first]) != self._real(paths[second]):
                continue  # hash collision
            what, fix = "an image is in two splits", "Keep one of the two lines"
            known = [list(SPLITS)[self.splits[row]] for row in rows]
            if known[0] == known[1] and self.codes[first] != self.codes[second]:
                what, fix = "an image has two labels", f"{fix}, or write them as one: cat|dog"
                known = [str(self.cells.values[self.codes[row]]) for row in rows]
            if known[0] != known[1]:
                one, other = (
                    f"{name!r} (line {lines[row]})" for name, row in zip(known, rows, strict=True)
                )
                raise self._error(
                    f"{what}: {one} and {other}: {paths[second]!r}", lines[second], fix
                )
        if len(same):
            first, second = lines[int(order[same[0]])], lines[int(order[same[0] + 1])]
            yield (
                f"{len(same):,} rows name an image again, such as lines {first} and {second}: it"
                " counts twice, and if validation is held out of train it may be in both"
            )

    def _real(self, path: str) -> str:
        """The path with folder links resolved."""
        folder, _, name = path.replace(os.sep, "/").rpartition("/")
        return f"{self._folder(folder + '/' if path[0] == '/' else folder)}/{name}"

    def _label(self, row: dict[str, object], line: int) -> object:
        """The cell of the label column, or the names of the columns that have a 1."""
        if not isinstance(self.label, list):
            return row.get(self.label or "")
        try:
            return one_hot_cell({column: row.get(column) for column in self.label})
        except ValueError as error:
            if not self.is_guess:
                raise self._error(str(error), line) from error
            what = f"no label column found; columns: {', '.join([self.image, *self.label])}"
            fix = f"Name it, or columns of 0 and 1: '{self.path}#label=COLUMN' or '...#label=A|B'"
            raise UserError(f"{what} ({error})", where=self.path, fix=fix) from error

    def _text(self, row: dict[str, object], column: str, what: str, line: int) -> str:
        value = row.get(column)
        if not isinstance(value, str):
            raise self._error(f"the {what} must be text, got {value!r}", line)
        if not value.strip():
            raise self._error(f"the {what} is empty", line)
        return value

    def _cell(self, row: dict[str, object], column: str, what: str, line: int) -> str:
        value = row.get(column)
        text = value if isinstance(value, str) else str(value)  # numbers and true in JSON
        return self._text({column: "" if value is None else text}, column, what, line).strip()

    def _error(self, what: str, line: int, fix: str = "Correct or remove the line") -> UserError:
        return UserError(what, where=f"{self.path}, line {line}", fix=fix)


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


def _csv_rows(file: TextIO, path: Path) -> _Rows:
    header = file.readline()
    separator = re.fullmatch(r'"?sep=(.)"?\s*', header)  # first line of some Excel exports
    file.seek(0)
    delimiter = separator[1] if separator else max(",;\t", key=header.count)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    columns: list[str] = []
    try:
        for cells in filter(None, reader):
            where = f"{path}, line {reader.line_num}"
            if separator and reader.line_num == 1:
                continue
            if not columns:
                columns = [cell.strip() for cell in cells]
                twice = next((name for name in columns if columns.count(name) > 1), None)
                if twice is not None:
                    what = f"two columns have the same name: {twice!r}"
                    raise UserError(what, where=where, fix="Rename or remove one")
                words = (word.lower() for name in columns for word in name.split())
                if any(word.endswith(image.SUFFIXES) for word in words):
                    what = f"the list has no header; its first line is {header.strip()[:80]!r}"
                    fix = f"{_EXAMPLE}. Paths alone: mixer predict MODEL - < {path}"
                    raise UserError(what, where=where, fix=fix)
                continue
            if len(cells) != len(columns):
                what = f"{len(cells)} fields, and the header has {len(columns)}"
                fix = "Correct the line; put a field with a comma in quotes"
                raise UserError(what, where=where, fix=fix)
            yield reader.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        fix = 'Put a field with a comma or a quote in quotes: "a, ""b"""'
        where = f"{path}, line {reader.line_num}"
        raise UserError(f"not CSV: {error}", where=where, fix=fix) from error


def _jsonl_rows(file: TextIO, path: Path) -> _Rows:
    known = {*IMAGE_COLUMNS, *LABEL_COLUMNS, "labels", "split", "is_valid", FOLD}
    columns: set[str] | None = None
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
        columns = set(row) if columns is None else columns
        for key in row.keys() - columns:
            if key.casefold() in known:
                what = f"the row has {key!r}, which the first row lacks"
                raise UserError(what, where=where, fix=f"Give every row a {key!r}, or none")
        yield line, row


def _check_some_exist(images: ImageFiles, path: Path) -> None:
    """Checks that at least one of 20 listed files exists."""
    some = np.unique(np.linspace(0, len(images) - 1, num=20).astype(np.int64)).tolist()
    if not any(os.path.lexists(images.item_name(at)) for at in some):
        what = f"the list's images are not there: {images.paths[0]!r}"
        fix = "Write file names with their endings, relative to the list's own folder"
        raise UserError(what, where=images.item_name(0), fix=fix)


KIND = Kind(
    "lists",
    lambda spec: spec.path.is_file() and spec.path.suffix.lower() in SUFFIXES,
    open_list,
    (*LABEL_OPTIONS, "image", GROUP),
)
