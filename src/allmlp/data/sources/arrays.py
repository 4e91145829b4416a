"""Arrays as data: sequences, spectrograms and other grids, from .npy, .npz and Parquet files.

Shapes: N rows, C channels, H W sides of the grid; (N, T) and (N, C, T) have H = 1 and W = T.
"""

from __future__ import annotations

import csv
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.classes import RawLabels, numbered
from allmlp.data.source import GROUP, ROW, Source, array_row
from allmlp.data.source_spec import LABEL_OPTIONS, SPLITS, SourceSpec, by_split, split_named
from allmlp.data.sources.columns import LABEL_COLUMNS, Kind, Rows, choose_column
from allmlp.data.sources.parquet import labels_in, open_file, parquet_files, read_column
from allmlp.errors import UserError, plural

SUFFIXES = (".npy", ".npz")
_X = ("x", "data", "values", "series", "inputs")  # names of the array itself
_Y = ("y", *LABEL_COLUMNS, "targets", "classes")
_PAD = "Cut or pad all rows to one length"
# Split, name, rows, other columns as values or as what reads them
Part = tuple[str, str, np.ndarray, dict[str, Any]]


class ArrayRows:
    """Rows as bytes of float32, (C, H, W); those of an .npy file stay on disk."""

    def __init__(self, values: np.ndarray, name: str) -> None:
        if values.dtype.kind not in "fiub" or values.ndim not in (2, 3, 4) or 0 in values.shape:
            what = f"an array of {values.dtype}, shape {values.shape}, is not rows of numbers"
            fix = "Rows are (N, T), (N, C, T) or (N, C, H, W)"
            raise UserError(what, where=name, fix=fix, code="shape")
        self.name, self.rows = name, _grid(values)
        self.shape = self.rows.shape[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "rows": None if isinstance(self.rows, np.memmap) else self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.rows is None:
            self.rows = _grid(np.load(self.name, mmap_mode="r"))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes:
        return self.rows[index].astype(ROW).tobytes()

    def item_name(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def check_finite(self) -> None:
        for at, row in enumerate(self.rows):
            with np.errstate(over="ignore"):
                finite = np.isfinite(row.astype(ROW))
            if not finite.all():
                channel, *place = np.argwhere(~finite)[0].tolist()
                what = f"channel {channel} has {row[channel][tuple(place)]} at {place}"
                where, fix = self.item_name(at), "Fill such gaps, or leave the row out"
                raise UserError(what, where=where, fix=fix, code="not-finite")


def _grid(values: np.ndarray) -> np.ndarray:
    return np.expand_dims(values, {2: (1, 2), 3: (2,), 4: ()}[values.ndim])


def statistics(source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and deviation of each channel over all rows; 1 if a deviation would be 0."""
    places = range(len(source))
    means = [array_row(source, at).mean(axis=(1, 2), dtype=np.float64) for at in places]
    mean = np.mean(means, axis=0)
    # A second pass, since sums of squares lose digits.
    shifted = (array_row(source, at) - mean[:, None, None] for at in places)
    deviation = np.sqrt(np.mean([(row**2).mean(axis=(1, 2)) for row in shifted], axis=0))
    return tuple(mean.tolist()), tuple(np.where(deviation > 0, deviation, 1.0).tolist())


def open_arrays(spec: SourceSpec, labels: bool) -> Iterator[Rows]:
    """Yields the splits, named by arrays (x_train), by files, or by a column `split`."""
    parts, shapes = _parts(spec), dict[Any, str]()
    asked = "label" in spec.options
    if labels and not asked and all(set(_Y).isdisjoint(columns) for *_, columns in parts):
        fix = "Call them y (.npz), NAME_labels.npy or NAME.csv (beside NAME.npy) or #label=NAME"
        raise UserError("the rows have no labels", where=spec.source, fix=fix, code="missing")
    for split, name, values, columns in parts:
        images, unused = ArrayRows(values, name), []
        shapes[images.shape] = split
        for column, cells in [*columns.items()]:
            if not isinstance(cells, partial) and np.shape(cells)[:1] != (len(values),):
                if column in _Y or column in spec.options.values():
                    what = f"{plural(len(values), 'row')}, and {column} of shape {np.shape(cells)}"
                    raise UserError(what, where=name, fix="Give every row one", code="lengths")
                del columns[column]
                unused.append(column)
        likely = [column for column in columns if column in _Y]
        channels, height, width = images.shape
        note = f"rows of {plural(channels, 'channel')} of {height}x{width} numbers"
        note += "; are channels last in the file? They come second" * (channels > width)
        note += f"; not used, as not of one value per row: {', '.join(unused)}" if unused else ""
        yield Rows(
            images,
            {column: partial(_raw_labels, cells, name) for column, cells in columns.items()},
            None if split == "train" and len(parts) == 1 else split,
            likely,
            is_labelled=asked or bool(likely),
            file=name,
            notes=(note,),
            prepare=images.check_finite,
        )
    if len(shapes) > 1:
        what = ", ".join(f"{shape} in {split}" for shape, split in shapes.items())
        raise UserError(f"rows have several shapes: {what}", where=spec.source, fix=_PAD)


def _parts(spec: SourceSpec) -> list[Part]:
    path = spec.path
    try:
        if path.suffix.lower() == ".npz":
            return list(_of_npz(spec))
        if path.suffix.lower() == ".npy":
            (split,) = by_split([path])
            return [(split, str(path), np.load(path, mmap_mode="r"), _beside(path))]
        return list(_of_parquet(spec))
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        what, fix = f"cannot read the arrays: {str(error)[:200]}", "Write the file again"
        if "bject" in str(error):  # Object arrays cannot be loaded, Python objects in dtype
            what = "the rows or labels are Python objects, such as sequences of several lengths"
            fix = f"{_PAD}; store text labels as y.astype(str)"
        raise UserError(what, where=path, fix=fix, code="damaged") from error


def _of_npz(spec: SourceSpec) -> Iterator[Part]:
    """x and y, x_train and y_train, x_test and y_test, ... in any case."""
    with spec.path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        splits: dict[str, dict[str, str]] = {}
        for key in file.files:
            words = re.split(r"[_.-]", key)
            split = next(filter(None, map(split_named, words)), "train")
            name = "_".join(word for word in words if split_named(word) is None) or key
            name = name.casefold() if name.casefold() in (*_X, *_Y) else name
            splits.setdefault(split, {})[name] = key
        names = list(dict.fromkeys(name for columns in splits.values() for name in columns))
        values = choose_column("image", spec, names, [n for n in names if n in _X], spec.path)
        for split in SPLITS:
            keys = dict(splits.get(split, {}))
            if key := keys.pop(values, None):
                columns = {name: file[other] for name, other in keys.items()}
                yield split, f"{spec.path}:{key}", file[key], columns


def _beside(path: Path) -> dict[str, Any]:
    """The columns beside NAME.npy: NAME_labels.npy, y.npy for x.npy, or a table NAME.csv."""
    found: dict[str, Any] = {}
    first = {"x": "y", "X": "Y"}.get(path.name[0], "")
    for name in (f"{path.stem}_labels.npy", first + path.name[1:]):
        if path.with_name(name).is_file() and name != path.name[1:]:
            found["y"] = np.load(path.with_name(name))
    table = path.with_suffix(".csv")
    if table.is_file():
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        found |= {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    return found


def _of_parquet(spec: SourceSpec) -> Iterator[Part]:
    for split, files in by_split(parquet_files(spec)).items():
        schema, name = open_file(files[0]).schema_arrow, files[0] if len(files) == 1 else spec.base
        column = choose_column("image", spec, schema.names, _lists(schema), name)
        tables = (read_column(file, column) for file in files)
        rows = [np.array(row) for table in tables for row in table.column(0).to_pylist()]
        wrong = [at for at, row in enumerate(rows) if row.shape != rows[0].shape]
        if wrong:
            what = f"shape {rows[wrong[0]].shape}, and {rows[0].shape} in row 0"
            raise UserError(what, where=f"{name}[{wrong[0]}]", fix=_PAD, code="lengths")
        others = [other for other in schema.names if other != column]
        yield split, name, np.array(rows), {o: partial(labels_in, files, o) for o in others}


def _lists(schema: Any) -> list[str]:
    """Returns the columns whose cells are lists of numbers, not of labels."""
    numbers = r"((large_|fixed_size_)?list<\w+: )+(halffloat|float|double|u?int\d+).*"
    fits = [field.name for field in schema if re.fullmatch(numbers, str(field.type))]
    return [name for name in fits if name.casefold() not in _Y]


def _raw_labels(cells: Any, name: str) -> RawLabels:
    if not isinstance(cells, np.ndarray):
        return cells() if isinstance(cells, partial) else numbered(cells)
    values = cells.astype(str) if cells.dtype.kind == "S" else cells
    if values[0].size == 1:
        return numbered(values.reshape(-1).tolist())
    if values.ndim != 2 or not np.isin(values, (0, 1)).all():
        what = f"labels of shape {values.shape} are not columns of 0 and 1"
        raise UserError(what, where=name, fix="Give every row one label", code="shape")
    names = [str(at) for at in range(values.shape[1])]
    hot = numbered(tuple(names[at] for at in np.flatnonzero(row)) for row in values)
    return replace(hot, class_names=names)


def names_arrays(spec: SourceSpec) -> bool:
    if spec.path.suffix.lower() in SUFFIXES:
        return spec.path.is_file()
    files = parquet_files(spec)
    schema = open_file(str(files[0])).schema_arrow if files else ()
    return bool(schema and _lists(schema)) and not any("bytes: " in str(f.type) for f in schema)


KIND = Kind("arrays", names_arrays, open_arrays, (*LABEL_OPTIONS, "image", GROUP))
