"""Lists of images: a CSV (.tsv, .txt) or JSONL file with a path in every row, and maybe a label.

Columns are found by their names; a `split` column gives the splits. Paths are relative to the
list's own folder.
"""

from __future__ import annotations

import csv
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from allmlp.data import image
from allmlp.data.classes import Cells, RawLabels, label_text
from allmlp.data.source import ImageFiles, PackedStrings, View
from allmlp.data.source_spec import SPLITS, SourceSpec, choose_column, split_named
from allmlp.data.sources.kind import Kind, Records
from allmlp.errors import UserError
from allmlp.io import parse_json

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "img")
LABEL_COLUMNS = ("label", "class", "target")
# Columns that somebody may think are used.
_SPLITS_OR_GROUPS = (
    r"(?i)(?<![a-z])(is_?)?(val|valid|validation|test|train|training|holdout|set|subset|partition|phase"
    r"|folds?|groups?|patients?|subjects?|persons?|video|clip|sequence|session|site|slide|study)"
    r"[-_ ]?(id|no|nr|num|number|name|idx|index)?(?![a-z])"
)
_MOST_FOLDERS = 10_000  # whose links are resolved
_EXAMPLE = "Begin the list with a header such as path,label (or path,label,split)"
_OBJECT = 'Every line is an object: {"path": "a.jpg", "label": "cat"}'
# A row: the number of its line and its cells; None for a missing cell.
_Rows = Iterator[tuple[int, list[object]]]


def open_list(spec: SourceSpec, labels: bool) -> dict[str, Records]:
    """Returns the splits of a list; one without a `split` column is all train."""
    path = spec.path
    with _open(path) as file:
        columns, rows = (_read_jsonl if path.suffix.lower() == ".jsonl" else _read_csv)(file, path)
        known = _known(columns, IMAGE_COLUMNS)
        path_column = choose_column("image", spec, columns, known, (), path)
        label = _label_column(spec, columns, path_column, path) if labels else None
        split = next((column for column in columns if column.casefold() == "split"), None)
        places = [None if name is None else columns.index(name) for name in (split, label)]
        table = _Table(path, columns.index(path_column), *places)
        paths = PackedStrings(table.read(rows))
    if not len(paths):
        raise UserError("the list has no rows", where=path, fix=_EXAMPLE)
    notes: list[str] = []
    if label is not None:
        rest = (name for name in columns if name not in (path_column, label, split))
        unused = [name for name in rest if re.search(_SPLITS_OR_GROUPS, name)]
        if unused:
            why = "only a column 'split' decides which images are held out"
            notes.append(f"columns that are not used: {', '.join(unused)} ({why})")
        notes += table.check_repeats(paths)
    images = ImageFiles(paths, "" if str(path.parent) == "." else str(path.parent))
    _check_some_exist(images, path)
    return table.splits(images, tuple(notes), label is not None)


def _label_column(spec: SourceSpec, columns: list[str], path_column: str, path: Path) -> str:
    rest = [column for column in columns if column != path_column]
    preferred = [column for column in rest if column.casefold() == "label"]
    return choose_column("label", spec, columns, _known(rest, LABEL_COLUMNS), preferred[:1], path)


class _Table:
    """Reads the rows of a list, and remembers the line, the split and the label of each."""

    def __init__(self, path: Path, image: int, split: int | None, label: int | None) -> None:
        self._path, self._split, self._image, self._label = path, split, image, label
        self._lines, self._split_codes, self._codes = array("q"), array("b"), array("q")
        self._cells = Cells()
        self._files = array("q")  # hashes of the images' real paths
        self._folders: dict[str, str] = {}
        self._from_windows: bool | None = None

    def read(self, rows: _Rows) -> Iterator[str]:
        """Yields the path of every row."""
        splits = list(SPLITS)
        for line, cells in rows:
            path = self._text(cells[self._image], "path", line)
            if "\0" in path or not _is_encodable(path):
                raise self._error(f"not the name of a file: {path!r}", line)
            if "\\" in path:
                if self._from_windows is None:  # the name of a file may have backslashes, too
                    self._from_windows = not os.path.lexists(self._path.parent / path)
                path = path.replace("\\", "/") if self._from_windows else path
            if self._label is not None:
                self._codes.append(self._cells.code(cells[self._label]))
                self._files.append(hash(self._real(path)))
            split = "train"
            if self._split is not None:
                text = self._text(cells[self._split], "split", line).strip()
                split = split_named(text)
                if split is None:
                    raise self._error(
                        f"unknown split {text!r}", line, f"Known: {', '.join(splits)}"
                    )
            self._split_codes.append(splits.index(split))
            self._lines.append(line)
            yield path

    def check_repeats(self, paths: PackedStrings) -> Iterator[str]:
        """Yields a note on images that several rows name.

        Raises UserError if these rows are in different splits, or have different labels.
        """
        order = np.argsort(np.asarray(self._files), kind="stable")
        same = np.flatnonzero(np.diff(np.asarray(self._files)[order]) == 0)
        pairs = np.stack([order[same], order[same + 1]])  # a row and the next of its image
        splits, codes = np.asarray(self._split_codes), np.asarray(self._codes)
        differ = (splits[pairs[0]] != splits[pairs[1]]) | (codes[pairs[0]] != codes[pairs[1]])
        for first, second in sorted(pairs[:, differ].T.tolist(), key=lambda pair: pair[1]):
            if self._real(paths[first]) != self._real(paths[second]):
                continue  # equal hashes of different paths
            if splits[first] != splits[second]:
                known = [list(SPLITS)[splits[row]] for row in (first, second)]
                what, fix = "an image is in two splits", "Keep one of the two lines"
            else:
                known = [self._label_of(int(codes[row]), row) for row in (first, second)]
                what = "an image has two labels"
                fix = "Keep one of the two lines: an image has one label here"
            if known[0] == known[1]:
                continue  # the same label in two types: 7 and "7"
            lines = [f"line {self._lines[row]}" for row in (first, second)]
            what += f": {known[0]!r} ({lines[0]}) and {known[1]!r} ({lines[1]}): {paths[second]!r}"
            raise self._error(what, self._lines[second], fix)
        if len(same):
            lines = " and ".join(str(self._lines[row]) for row in pairs[:, 0])
            yield (
                f"{len(same):,} rows name an image again, such as lines {lines}: it counts twice,"
                " and if validation is held out of train it may be in both"
            )

    def _label_of(self, code: int, row: int) -> str:
        try:
            return label_text(self._cells.values[code])
        except UserError as error:
            raise self._error(error.what, self._lines[row]) from None

    def _real(self, path: str) -> str:
        """The path without links among its folders; of very many folders only without ".."."""
        path = path.replace(os.sep, "/")
        at = path.rfind("/") + 1
        folder = self._folders.get(path[:at])
        if folder is None:
            is_known = len(self._folders) < _MOST_FOLDERS
            resolve = os.path.realpath if is_known else os.path.abspath
            folder = resolve(self._path.parent / path[:at])
            if is_known:
                self._folders[path[:at]] = folder
        return f"{folder}/{path[at:]}"

    def _text(self, value: object, what: str, line: int) -> str:
        if not isinstance(value, str):
            shown = "nothing" if value is None else repr(value)
            raise self._error(f"the {what} must be text, got {shown}", line)
        if not value.strip():
            raise self._error(f"the {what} is empty", line)
        return value

    def _error(self, what: str, line: int, fix: str = "Correct or remove the line") -> UserError:
        return UserError(what, where=f"{self._path}, line {line}", fix=fix)

    def splits(
        self, images: ImageFiles, notes: tuple[str, ...], has_labels: bool
    ) -> dict[str, Records]:
        codes = np.asarray(self._split_codes)
        found: dict[str, Records] = {}
        for number, split in enumerate(SPLITS):
            rows = np.flatnonzero(codes == number)
            if len(rows):
                labels = None
                if has_labels:
                    lines = np.asarray(self._lines)[rows]
                    labels = RawLabels(
                        np.asarray(self._codes)[rows],
                        self._cells.values,
                        where=lambda at, lines=lines: f"{self._path}, line {lines[at]}",
                    )
                own = View(split, [], codes[rows], images, rows)  # its labels are made later
                found[split] = Records(own, labels, notes)
        return found


def _open(path: Path) -> TextIO:
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError("the list is UTF-16 text", where=path, fix="Save it as UTF-8")
        # File names need not be UTF-8; those that are not come back unchanged.
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise UserError(f"cannot read the list: {error.strerror}", where=path) from error


def _read_csv(file: TextIO, path: Path) -> tuple[list[str], _Rows]:
    header, start = file.readline(), 0
    separator = re.fullmatch(r'"?sep=(.)"?\s*', header)  # the first line of some lists from Excel
    if separator:
        start = file.tell()
        header = file.readline()
    file.seek(start)
    delimiter = separator[1] if separator else max(",;\t", key=header.count)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    before = 1 if separator else 0

    def rows() -> _Rows:
        try:
            for cells in reader:
                if cells:
                    yield before + reader.line_num, list(cells)
        except csv.Error as error:
            where = f"{path}, line {before + reader.line_num}"
            fix = 'Put a field with a comma or a quote in quotes: "a, ""b"""'
            raise UserError(f"not CSV: {error}", where=where, fix=fix) from error

    found = rows()
    columns = [str(cell).strip() for cell in next(found, (0, []))[1]]
    if not columns:
        raise UserError("the list is empty", where=path, fix=_EXAMPLE)
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        what = f"two columns have the same name: {twice!r}"
        raise UserError(what, where=f"{path}, line 1", fix="Rename or remove one")
    if any(word.lower().endswith(image.SUFFIXES) for name in columns for word in name.split()):
        what = f"the list has no header; its first line is {header.strip()[:80]!r}"
        fix = f"{_EXAMPLE}. Paths alone: mixer predict MODEL - < {path}"
        raise UserError(what, where=f"{path}, line 1", fix=fix)

    def checked() -> _Rows:
        for line, cells in found:
            if len(cells) != len(columns):
                what = f"{len(cells)} fields, and the header has {len(columns)}"
                fix = "Correct the line; put a field with a comma in quotes"
                raise UserError(what, where=f"{path}, line {line}", fix=fix)
            yield line, cells

    return columns, checked()


def _read_jsonl(file: TextIO, path: Path) -> tuple[list[str], _Rows]:
    def objects() -> Iterator[tuple[int, dict[str, object]]]:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            where = f"{path}, line {line}"
            try:
                value = parse_json(text)
            except ValueError as error:
                reason = str(error).partition(":")[0]
                raise UserError(f"not JSON: {reason}", where=where, fix=_OBJECT) from error
            if not isinstance(value, dict):
                what = f"not a JSON object: {text.strip()[:80]}"
                raise UserError(what, where=where, fix=_OBJECT)
            yield line, value

    found = objects()
    first = next(found, None)
    if first is None:
        raise UserError("the list is empty", where=path)
    columns = list(first[1])

    def rows() -> _Rows:
        yield first[0], [first[1].get(column) for column in columns]
        for line, value in found:
            for key in value.keys() - set(columns):
                if key.casefold() in (*IMAGE_COLUMNS, *LABEL_COLUMNS, "split"):
                    what = f"the row has {key!r}, which the first row lacks"
                    fix = f"Give every row a {key!r}, or none"
                    raise UserError(what, where=f"{path}, line {line}", fix=fix)
            yield line, [value.get(column) for column in columns]

    return columns, rows()


def _known(columns: list[str], names: tuple[str, ...]) -> list[str]:
    return [column for column in columns if column.casefold() in names]


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _check_some_exist(images: ImageFiles, path: Path) -> None:
    """Checks that at least one of 20 files of the list is there."""
    some = np.unique(np.linspace(0, len(images) - 1, num=20).astype(np.int64)).tolist()
    if not any(os.path.lexists(images.item_name(at)) for at in some):
        what = f"the list's images are not there: {images.paths[0]!r}"
        fix = "Paths in a list are relative to the list's own folder"
        if re.match(r"[A-Za-z]:/", images.paths[0]):
            fix += "; those on a drive of Windows cannot be found elsewhere"
        if any(os.path.exists(images.item_name(0) + ending) for ending in image.SUFFIXES):
            fix = "Write the file names with their endings"
        raise UserError(what, where=images.item_name(0), fix=fix)


KIND = Kind(
    "lists",
    lambda spec: spec.path.is_file() and spec.path.suffix.lower() in SUFFIXES,
    open_list,
    ("label", "image"),
)
