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
from pathlib import Path
from typing import TextIO

import numpy as np

from allmlp.data.classes import RawLabels, numbered
from allmlp.data.source import GROUP, ImageFiles, PackedStrings
from allmlp.data.source_spec import LABEL_OPTIONS, SourceSpec
from allmlp.data.sources.columns import LABEL_COLUMNS, Kind, Rows, choose_column
from allmlp.errors import UserError, plural
from allmlp.io import parse_json

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "img")
_EXAMPLE = "Begin the list with a header such as path,label (or path,label,split)"
_NO_NAME = "[\ud800-\udc7f\udd00-\udfff\0]"  # surrogates other than those of undecodable bytes
_FIX = 'Correct the line; in CSV, put a field with a comma or a quote in quotes: "a, b"'


def open_list(spec: SourceSpec, labels: bool) -> Iterator[Rows]:
    """Yields the rows of a list; without a column of splits everything is train."""
    path, lines, columns = spec.path, list[int](), dict[str, list[object]]()
    with _open(path) as file:
        read = _read_jsonl if path.suffix.lower() == ".jsonl" else _read_csv
        for line, row in read(file, path):
            for name in row:
                if name not in columns:
                    columns[name] = [None] * len(lines)
            for name, column in columns.items():
                column.append(row.get(name))
            lines.append(line)
    if not lines:
        raise UserError("the list has no rows", where=path, fix=_EXAMPLE)

    def where(row: int) -> str:
        return f"{path}, line {lines[row]}"

    likely = [name for name in columns if name.casefold() in IMAGE_COLUMNS]
    image = choose_column("image", spec, [*columns], likely, path)
    paths = PackedStrings(_paths(columns.pop(image), path.parent, where))
    images = ImageFiles(paths, "" if str(path.parent) == "." else str(path.parent))
    some = np.unique(np.linspace(0, len(images) - 1, num=20).astype(np.int64)).tolist()
    if not any(os.path.lexists(images.item_name(at)) for at in some):
        what = f"none of the listed images exists, such as {paths[0]!r}"
        fix = "Write file names with their endings, relative to the list's own folder"
        raise UserError(what, where=images.item_name(0), fix=fix)

    yield Rows(
        images,
        {name: functools.partial(numbered, cells) for name, cells in columns.items()},
        likely=[name for name in columns if name.casefold() in LABEL_COLUMNS],
        may_be_hot=True,
        file=path,
        where=where,
        check=functools.partial(_check_repeats, spec, paths, where),
    )


def _paths(cells: list[object], folder: Path, where: Callable[[int], str]) -> Iterator[str]:
    from_windows = None
    for row, path in enumerate(cells):
        if not isinstance(path, str) or not path.strip() or re.search(_NO_NAME, path):
            raise UserError(f"not the name of a file: {path!r}", where=where(row), fix=_FIX)
        if "\\" in path and from_windows is None:  # file names may contain backslashes
            from_windows = not os.path.lexists(folder / path)
        yield path.replace("\\", "/") if from_windows else path


def _check_repeats(
    spec: SourceSpec,
    paths: PackedStrings,
    where: Callable[[int], str],
    splits: list[str],
    raw: RawLabels,
) -> dict[str, str]:
    repeated: Counter[str] = Counter()
    real_folder = functools.cache(lambda name: os.path.realpath(spec.path.parent / name))
    texts = [str(value) for value in raw.values]
    labels = [texts[code] for code in raw.codes.tolist()]
    seen: dict[int, int] = {}  # hash of the path: first row
    for row, split in enumerate(splits):
        head, _, name = paths[row].replace(os.sep, "/").rpartition("/")
        real = f"{real_folder(head + '/' if paths[row][0] == '/' else head)}/{name}"
        first = seen.setdefault(hash(real), row)
        repeated[split] += first != row
        for what, values in (("is in two splits", splits), ("has two labels", labels)):
            if values[first] != values[row]:
                line = where(first).rpartition(" ")[2]
                what = f"an image {what}: {values[first]!r} (line {line}) and {values[row]!r}"
                fix = "Keep one of the two lines, or write two labels as one: cat|dog"
                raise UserError(f"{what}: {paths[row]!r}", where=where(row), fix=fix)
    if GROUP in spec.options:  # which may keep them together
        return {}
    note = "an image is there twice in {} of {}: holdouts and folds may have it on both sides"
    counts = ((split, plural(number, "row")) for split, number in (+repeated).items())
    return {split: note.format(rows, spec.path.name) for split, rows in counts}


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        is_utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    # File names need not be UTF-8; surrogateescape preserves them.
    encoding, errors = ("utf-16", "replace") if is_utf16 else ("utf-8-sig", "surrogateescape")
    return path.open(encoding=encoding, errors=errors, newline="")


def _read_csv(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    first = file.readline()
    separator = re.fullmatch(r'"?sep=(.)"?\s*', first)  # of some Excel exports
    above = 1 if separator else file.seek(0)  # lines
    delimiter = separator[1] if separator else max(",;\t", key=first.count)
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)

    def mistake(what: str) -> UserError:
        return UserError(what, where=f"{path}, line {above + reader.reader.line_num}", fix=_FIX)

    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        if len(set(names)) < len(names):
            raise mistake(f"two columns have the same name: {names}")
        for row in reader:
            if None in row or None in row.values():
                raise mistake(f"more or fewer fields than the {len(names)} of the header")
            yield above + reader.line_num, row
    except csv.Error as error:
        raise mistake(f"not CSV: {error}") from error


def _read_jsonl(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
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
        yield line, row


KIND = Kind(
    "lists",
    lambda spec: spec.path.is_file() and spec.path.suffix.lower() in SUFFIXES,
    open_list,
    (*LABEL_OPTIONS, "image", GROUP),
)
