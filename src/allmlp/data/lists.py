"""Lists of images: a CSV (.tsv, .txt) or JSONL file with a path in every row, and perhaps a label.

The columns are found by their names in the header; a `split` column gives the splits. Paths are
relative to the list's own folder. The order of the rows never changes the order of the classes.
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
from allmlp.data.classes import Cells, labels_of_values
from allmlp.data.folders import SPLIT_FOLDERS, split_named
from allmlp.data.items import ImageFiles, PackedStrings, Source, no_labels, subset
from allmlp.data.source_names import SourceName, choose_column
from allmlp.errors import UserError
from allmlp.io import parse_json

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "img")
LABEL_COLUMNS = ("label", "class", "target")
# Columns that somebody may think are heeded.
_SPLITS_OR_GROUPS = (
    r"(?i)(?<![a-z])(is_?)?(val|valid|validation|test|train|training|holdout|set|subset|partition|phase"
    r"|folds?|groups?|patients?|subjects?|persons?|video|clip|sequence|session|site|slide|study)"
    r"[-_ ]?(id|no|nr|num|number|name|idx|index)?(?![a-z])"
)
_MOST_FOLDERS = 10_000  # whose links are resolved
_EXAMPLE = "Begin the list with a header such as path,label (or path,label,split)"
# A row: the number of its line and its cells; None where a cell is not there.
_Rows = Iterator[tuple[int, list[object]]]


def open_list(name: SourceName, *, matched: bool = True, labels: bool = True) -> dict[str, Source]:
    """Returns the splits of a list; one without a `split` column is all train.

    Args:
        name: the list's own, with the columns as options where they are not found by their names.
        matched: whether every class must have an image in train.
        labels: whether they are needed; without them no column of labels is looked for.

    Raises:
        UserError: the list cannot be read, or names the line that is wrong in it.
    """
    path = Path(os.path.expanduser(name.base))
    name.refuse_options(("label", "image"), "a list")
    with _open(path) as file:
        columns, rows = (_read_jsonl if path.suffix.lower() == ".jsonl" else _read_csv)(file, path)
        path_column = choose_column(
            "image", name, columns, _known(columns, IMAGE_COLUMNS), (), path
        )
        label = _label_column(name, columns, path_column, path) if labels else None
        split = next((column for column in columns if column.casefold() == "split"), None)
        places = [None if each is None else columns.index(each) for each in (split, label)]
        table = _Table(path, columns.index(path_column), *places)
        paths = PackedStrings(table.read(rows))
    if not len(paths):
        raise UserError("the list has no rows", where=path, fix=_EXAMPLE)
    notes: list[str] = []
    names, codes = no_labels(len(paths))
    if label is not None:
        codes, names = table.labels(are_numbers=not matched)
        rest = (each for each in columns if each not in (path_column, label, split))
        unused = [each for each in rest if re.search(_SPLITS_OR_GROUPS, each)]
        if unused:
            said = "only a column 'split' says which images are held out"
            notes.append(f"columns that are not used: {', '.join(unused)} ({said})")
        notes += table.check_repeats(paths, names, codes)
    folder = "" if str(path.parent) == "." else str(path.parent)
    whole = ImageFiles(name.source, names, codes, paths, folder, tuple(notes))
    _check_some_exist(whole, path)
    return table.splits(whole, name.source, matched)


def _label_column(name: SourceName, columns: list[str], path_column: str, path: Path) -> str:
    rest = [column for column in columns if column != path_column]
    preferred = [column for column in rest if column.casefold() == "label"]
    known = _known(rest, LABEL_COLUMNS)
    return choose_column("label", name, columns, known, preferred[:1], path)


class _Table:
    """Reads the rows of a list, and remembers of each its line, its split and its label."""

    def __init__(self, path: Path, image: int, split: int | None, label: int | None) -> None:
        self._path, self._split, self._image, self._label = path, split, image, label
        self._lines, self._split_codes, self._codes = array("q"), array("b"), array("q")
        self._cells = Cells()
        self._files = array("q")  # a hash of each image's real path
        self._folders: dict[str, str] = {}
        self._from_windows: bool | None = None

    def read(self, rows: _Rows) -> Iterator[str]:
        """Yields the path of every row."""
        splits = list(SPLIT_FOLDERS)
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

    def labels(self, *, are_numbers: bool) -> tuple[np.ndarray, list[str]]:
        """Returns the labels of the rows and the class names."""
        codes, values = np.asarray(self._codes), self._cells.values
        return labels_of_values(codes, values, self._place, are_numbers=are_numbers)

    def check_repeats(
        self, paths: PackedStrings, names: list[str], labels: np.ndarray
    ) -> Iterator[str]:
        """Yields a note on images that several rows name.

        Raises:
            UserError: these rows are in different splits, or have different labels.
        """
        order = np.argsort(np.asarray(self._files), kind="stable")
        same = np.flatnonzero(np.diff(np.asarray(self._files)[order]) == 0)
        pairs = np.stack([order[same], order[same + 1]])  # each row and the next of its image
        splits = np.asarray(self._split_codes)
        differ = (splits[pairs[0]] != splits[pairs[1]]) | (labels[pairs[0]] != labels[pairs[1]])
        for first, second in sorted(pairs[:, differ].T.tolist(), key=lambda pair: pair[1]):
            if self._real(paths[first]) != self._real(paths[second]):
                continue  # equal hashes of different paths
            lines = [f"line {self._lines[row]}" for row in (first, second)]
            if splits[first] != splits[second]:
                known = [list(SPLIT_FOLDERS)[splits[row]] for row in (first, second)]
                what, fix = "an image is in two splits", "Keep one of the two lines"
            else:
                known = [repr(names[labels[row]]) for row in (first, second)]
                what = "an image has two labels"
                fix = "Keep one of the two lines: an image has one label here"
            what += f": {known[0]} ({lines[0]}) and {known[1]} ({lines[1]}): {paths[second]!r}"
            raise self._error(what, self._lines[second], fix)
        if len(same):
            lines = " and ".join(str(self._lines[row]) for row in pairs[:, 0])
            yield (
                f"{len(same):,} rows name an image again, such as lines {lines}: it counts twice,"
                " and where validation is held out of train it may be in both"
            )

    def _real(self, path: str) -> str:
        """The path without links among its folders; of very many folders only without ".."."""
        path = path.replace(os.sep, "/")
        at = path.rfind("/") + 1
        folder = self._folders.get(path[:at])
        if folder is None:
            is_known = len(self._folders) < _MOST_FOLDERS
            folder = (os.path.realpath if is_known else os.path.abspath)(
                self._path.parent / path[:at]
            )
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

    def _place(self, row: int) -> str:
        return f"{self._path}, line {self._lines[row]}"

    def _error(self, what: str, line: int, fix: str = "Correct or remove the line") -> UserError:
        return UserError(what, where=f"{self._path}, line {line}", fix=fix)

    def splits(self, whole: ImageFiles, name: str, matched: bool) -> dict[str, Source]:
        codes = np.asarray(self._split_codes)
        rows = {split: np.flatnonzero(codes == at) for at, split in enumerate(SPLIT_FOLDERS)}
        rows = {split: found for split, found in rows.items() if len(found)}
        splits = {split: subset(whole, at, f"{name}:{split}") for split, at in rows.items()}
        if "train" not in splits or len(splits) == 1 or not matched:
            return dict(splits)
        known = np.zeros(len(whole.class_names), dtype=bool)
        known[splits["train"].labels] = True
        for source in splits.values():
            strange = np.flatnonzero(~known[source.labels])
            if len(strange):
                row = int(source.indices[strange[0]])
                what = f"class {whole.class_names[whole.labels[row]]!r} has no image in train"
                raise self._error(what, self._lines[row], "Add some, or remove the line")
        return dict(splits)


def _open(path: Path) -> TextIO:
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError("the list is UTF-16 text", where=path, fix="Save it as UTF-8")
        # File names need not be UTF-8; whatever is not comes back as it was.
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise UserError(f"cannot read the list: {error.strerror}", where=path) from error


def _read_csv(file: TextIO, path: Path) -> tuple[list[str], _Rows]:
    header, start = file.readline(), 0
    told = re.fullmatch(r'"?sep=(.)"?\s*', header)  # the first line of some lists of Excel
    if told:
        start = file.tell()
        header = file.readline()
    file.seek(start)
    delimiter = told[1] if told else max(",;\t", key=header.count)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    before = 1 if told else 0

    def rows() -> _Rows:
        try:
            for cells in reader:
                if cells:
                    yield before + reader.line_num, list(cells)
        except csv.Error as error:
            where = f"{path}, line {before + reader.line_num}"
            fix = 'A field with a comma or a quote stands in quotes: "a, ""b"""'
            raise UserError(f"not CSV: {error}", where=where, fix=fix) from error

    found = rows()
    columns = [str(cell).strip() for cell in next(found, (0, []))[1]]
    if not columns:
        raise UserError("the list is empty", where=path, fix=_EXAMPLE)
    twice = next((each for each in columns if columns.count(each) > 1), None)
    if twice is not None:
        what = f"two columns have one name: {twice!r}"
        raise UserError(what, where=f"{path}, line 1", fix="Rename or remove one")
    if any(word.lower().endswith(image.SUFFIXES) for each in columns for word in each.split()):
        what = f"the list has no header; its first line is {header.strip()[:80]!r}"
        fix = f"{_EXAMPLE}. Paths alone: mixer predict MODEL - < {path}"
        raise UserError(what, where=f"{path}, line 1", fix=fix)

    def checked() -> _Rows:
        for line, cells in found:
            if len(cells) != len(columns):
                what = f"{len(cells)} fields, and the header has {len(columns)}"
                fix = "Correct the line; a field with a comma stands in quotes"
                raise UserError(what, where=f"{path}, line {line}", fix=fix)
            yield line, cells

    return columns, checked()


def _read_jsonl(file: TextIO, path: Path) -> tuple[list[str], _Rows]:
    def objects() -> Iterator[tuple[int, dict[str, object]]]:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                value = parse_json(text)
            except ValueError as error:
                reason = str(error).partition(":")[0]
                where = f"{path}, line {line}"
                fix = 'Every line is an object: {"path": "a.jpg", "label": "cat"}'
                raise UserError(f"not JSON: {reason}", where=where, fix=fix) from error
            if not isinstance(value, dict):
                where = f"{path}, line {line}"
                fix = 'Every line is an object: {"path": "a.jpg", "label": "cat"}'
                raise UserError(f"not a JSON object: {text.strip()[:80]}", where=where, fix=fix)
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


def _check_some_exist(whole: ImageFiles, path: Path) -> None:
    """Refuses a list of whose files, looked for here and there, none is found."""
    some = np.unique(np.linspace(0, len(whole) - 1, num=20).astype(np.int64)).tolist()
    if not any(os.path.lexists(whole.item_name(at)) for at in some):
        what = f"the list's images are not there: {whole.paths[0]!r}"
        fix = "Paths in a list are relative to the list's own folder"
        if re.match(r"[A-Za-z]:/", whole.paths[0]):
            fix += "; those of a drive of Windows are nowhere else"
        if any(os.path.exists(whole.item_name(0) + ending) for ending in image.SUFFIXES):
            fix = "Write the names of the files with their endings"
        raise UserError(what, where=whole.item_name(0), fix=fix)
