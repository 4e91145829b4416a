"""Lists of images: a CSV or JSONL file with a path in every row, and a label if it has one.

The columns are found by their names in the header; a `split` column gives the splits. Paths are
relative to the list's own folder. The order of the rows never changes the order of the classes.
"""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from mlp_mixer.data import image
from mlp_mixer.data.classes import labels_of_values
from mlp_mixer.data.folders import SPLIT_FOLDERS, split_named
from mlp_mixer.data.items import ImageFiles, PackedStrings, Source, no_labels, subset
from mlp_mixer.data.source_names import SourceName, choose_column
from mlp_mixer.disk import parse_json
from mlp_mixer.errors import UserError

SUFFIXES = (".csv", ".jsonl")
IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "img")
LABEL_COLUMNS = ("label", "class", "target")
_EXAMPLE = "Begin the list with a header such as path,label (or path,label,split)"
# A row: the number of its line and its cells; None where a cell is not there.
_Rows = Iterator[tuple[int, list[object]]]


def open_list(name: SourceName, *, matched: bool = True, labels: bool = True) -> dict[str, Source]:
    """Returns the splits of a CSV or JSONL list; one without a `split` column is all train.

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
        whole = table.read(rows, name.source)
    if not len(whole):
        raise UserError("the list has no rows", where=path, fix=_EXAMPLE)
    _check_some_exist(whole, path)
    return table.splits(whole, name.source, matched)


def _label_column(name: SourceName, columns: list[str], path_column: str, path: Path) -> str:
    rest = [column for column in columns if column != path_column]
    preferred = [column for column in rest if column.casefold() == "label"]
    known = _known(rest, LABEL_COLUMNS)
    return choose_column("label", name, columns, known, preferred[:1], path)


class _Table:
    """Reads the rows of a list, and remembers of each its line and its split."""

    def __init__(self, path: Path, image: int, split: int | None, label: int | None) -> None:
        self._path, self._split, self._image, self._label = path, split, image, label
        self._lines, self._split_codes, self._codes = array("q"), array("b"), array("q")
        self._values: dict[str, int] = {}
        self._folded: dict[str, tuple[str, int]] = {}

    def read(self, rows: _Rows, name: str) -> ImageFiles:
        paths = PackedStrings(self._read(rows))
        if self._label is None:
            names, labels = no_labels(len(paths))
        else:
            labels, names = labels_of_values(np.asarray(self._codes), list(self._values))
        folder = str(self._path.parent)
        return ImageFiles(name, names, labels, paths, "" if folder == "." else folder)

    def _read(self, rows: _Rows) -> Iterator[str]:
        splits = list(SPLIT_FOLDERS)
        for line, cells in rows:
            path = self._text(cells[self._image], "path", line)
            if "\0" in path or not _is_encodable(path):
                raise self._error(f"not the name of a file: {path!r}", line)
            if self._label is not None:
                self._codes.append(self._code(cells[self._label], line))
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

    def _code(self, value: object, line: int) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        label = self._text(value, "label", line).strip()
        if label not in self._values:
            try:
                label.encode()
            except UnicodeEncodeError:
                raise self._error(f"the label is not UTF-8: {label!r}", line) from None
            twin, first = self._folded.setdefault(label.casefold(), (label, line))
            if twin != label:
                what = f"classes that differ only in case: {twin} (line {first}), {label}"
                raise self._error(what, line, "Write it in one way")
            self._values[label] = len(self._values)
        return self._values[label]

    def _text(self, value: object, what: str, line: int) -> str:
        if not isinstance(value, str):
            shown = "nothing" if value is None else repr(value)
            raise self._error(f"the {what} must be text, got {shown}", line)
        if not value.strip():
            raise self._error(f"the {what} is empty", line)
        return value

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
    header = file.readline()
    file.seek(0)
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(file, delimiter=delimiter, strict=True)

    def rows() -> _Rows:
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, list(cells)
        except csv.Error as error:
            where = f"{path}, line {reader.line_num}"
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
    if any(each.lower().endswith(image.SUFFIXES) for each in columns):
        what = f"the list has no header; its first line is {header.strip()[:80]!r}"
        raise UserError(what, where=f"{path}, line 1", fix=_EXAMPLE)

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
        raise UserError(what, where=whole.item_name(0), fix=fix)
