"""Parquet files in the Hugging Face image layout: a struct<bytes, path> column and a label column.

A split of up to `HELD_BYTES` is held in memory, shared by forked workers. A larger one is read by
row group: fast in order, but in random order every image costs a whole group.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.classes import RawLabels, natural_order, numbered
from allmlp.data.multi_label import one_hot_cell
from allmlp.data.source import PackedBytes, Source, values_of
from allmlp.data.source_spec import (
    FOLD,
    GROUP,
    LABEL_COLUMNS,
    LABEL_OPTIONS,
    SPLITS,
    Kind,
    Records,
    Roles,
    SourceSpec,
    choose_column,
    choose_labels,
    split_of_file,
)
from allmlp.errors import UserError
from allmlp.io import parse_json
from allmlp.names import optional

HELD_BYTES = 2**30  # encoded images per split
_LISTS = ("Sequence", "List", "LargeList")
_GROUPS_KEPT = 2  # row groups cached if a split is not held in memory


def parquet_files(spec: SourceSpec) -> list[Path]:
    """Returns the Parquet files named by a file, folder or pattern."""
    path = spec.path
    if path.is_dir():
        files = [*path.glob("*.parquet")] or [*path.glob("data/*.parquet")]
        return [file for file in files if file.name[0] != "."]
    if path.exists() or not glob.has_magic(spec.base):
        return [path] if path.is_file() and path.suffix.lower() == ".parquet" else []
    files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
    return files if all(file.suffix.lower() == ".parquet" for file in files) else []


def open_parquet(spec: SourceSpec, labels: bool) -> dict[str, Records]:
    """Returns the splits, found by file name or else by a column; reads no images."""
    by_split: dict[str, list[str]] = {}
    for path in sorted(parquet_files(spec), key=lambda path: natural_order(str(path))):
        by_split.setdefault(split_of_file(path), []).append(str(path))
    found = {split: _open(by_split[split], spec, labels) for split in SPLITS if split in by_split}
    files = next(iter(by_split.values()))
    roles = Roles.find(spec, open_file(files[0]).schema_arrow.names, files[0])
    notes = tuple(roles.notes())
    if roles.split is not None and list(found) == ["train"]:
        found = _by_column(found["train"], roles, files[0])
    elif roles.split is not None:
        notes = (f"the column {roles.split!r} is not used: the files' names say it", *notes[1:])
    return {split: replace(records, notes=notes) for split, records in found.items()}


def _by_column(records: Records, roles: Roles, file: str) -> dict[str, Records]:
    """Divides records by the column of splits."""
    images, raw = records.images, records.labels
    cells = values_of(images, str(roles.split))
    if cells is None:
        what = f"only some of the files have the column {roles.split!r}"
        raise UserError(what, where=file, fix="Give files that belong together")
    splits = np.array([roles.split_of(cell) or "" for cell in cells])
    if "" in splits:
        at = splits.tolist().index("")
        what = f"unknown split {cells[at]!r} in the column {roles.split!r}"
        fix = f"Known: {', '.join(SPLITS)}; in a column is_valid: true, false"
        raise UserError(what, where=images.item_name(at), fix=fix)
    found: dict[str, Records] = {}
    for split in SPLITS:
        at = np.flatnonzero(splits == split)
        if len(at):
            own = None if raw is None else replace(raw, codes=raw.codes[at])
            found[split] = replace(records, images=Source(split, [], at, images, at), labels=own)
    return found


def _open(files: list[str], spec: SourceSpec, labels: bool) -> Records:
    schema = open_file(files[0]).schema_arrow
    column = _image_column(schema, spec, files[0])
    label = _label_columns(schema, spec, files[0]) if labels else []
    groups: list[tuple[int, int, int]] = []
    chunks: list[Any] = []
    row = 0
    for at, file in enumerate(files):
        reader = open_file(file)
        own = reader.schema_arrow
        for name in (column, *label):
            kind, other = (s.field(name).type if name in s.names else None for s in (schema, own))
            if kind != other or class_names_of(schema, name) != class_names_of(own, name):
                what = f"column {name!r} is {other} here and {kind} in {files[0]}"
                if kind == other:
                    what = f"column {name!r} has other classes than in {files[0]}"
                raise UserError(what, where=file, fix="Give files that belong together")
        if label:
            with _damage_reported(file):
                chunks += reader.read(columns=label, use_threads=False).select(label).to_batches()
        for group in range(reader.num_row_groups):
            groups.append((at, group, row))
            row += reader.metadata.row_group(group).num_rows
    if row == 0:
        raise UserError("the files have no rows", where=", ".join(files[:3]))
    roles = Roles.find(spec, schema.names, files[0])
    images = ParquetImages(files, column, np.array(groups, dtype=np.int64), row)
    images.columns = {GROUP: roles.group, FOLD: roles.fold}
    raw = _raw_labels(schema, label, chunks, files[0]) if label else None
    return Records(images, raw, prepare=images.hold)


def _raw_labels(schema: Any, columns: list[str], batches: list[Any], file: str) -> RawLabels:
    import pyarrow as pa
    import pyarrow.types as types

    table = pa.Table.from_batches(batches)
    values, names = table.column(0), class_names_of(schema, columns[0])
    if len(columns) > 1:
        return _one_hot(table, file)
    if types.is_nested(values.type):
        rows = ([] if row is None else row for row in values.to_pylist())
        cells = [row if names is None else [names[at] for at in row] for row in rows]
        return numbered(cells)
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if names is not None and not values.null_count:
        if not types.is_integer(values.type):
            what = f"the labels are {values.type}, and the file's metadata says classes by number"
            raise UserError(what, where=file, fix="Choose another column: SOURCE#label=COLUMN")
        return RawLabels(values.to_numpy(), names, are_classes=True)
    encoded = values.combine_chunks().dictionary_encode(null_encoding="encode")
    return RawLabels(encoded.indices.to_numpy(), encoded.dictionary.to_pylist())


def _one_hot(table: Any, file: str) -> RawLabels:
    """The labels of several columns of 0 and 1."""
    try:
        cells = [one_hot_cell(row) for row in table.to_pylist()]
    except ValueError as error:
        raise UserError(str(error), where=file, fix="Name columns of 0 and 1") from error
    return replace(numbered(cells), class_names=table.column_names)


def _image_column(schema: Any, spec: SourceSpec, file: str) -> str:
    import pyarrow.types as types

    structs = [field for field in schema if types.is_struct(field.type)]
    images = [
        field.name
        for field in structs
        if any(part.name == "bytes" and "binary" in str(part.type) for part in field.type)
    ]
    named = [name for name in schema.names if name in ("image", "img")]
    column = choose_column("image", spec, schema.names, images or named, ("image", "img"), file)
    if column not in images:
        what = f"column {column!r} is {schema.field(column).type}, not struct<bytes: binary, path>"
        raise UserError(what, where=file, fix="Give a file in the Hugging Face image layout")
    return column


def _label_columns(schema: Any, spec: SourceSpec, file: str) -> list[str]:
    """Returns the label column, or several of 0 and 1 if they are named."""
    import pyarrow.types as types

    def fits(name: str) -> bool:
        kind = schema.field(name).type
        if types.is_list(kind) or types.is_large_list(kind):  # several labels per image
            return types.is_integer(kind.value_type) or _is_text(kind.value_type)
        return not types.is_nested(kind) and not types.is_binary(kind) and not types.is_null(kind)

    classes = [name for name in schema.names if class_names_of(schema, name) is not None]
    named = [name for name in schema.names if name.casefold() in LABEL_COLUMNS]
    chosen = classes or list(filter(fits, named)) or named
    label = choose_labels(spec, schema.names, chosen, ("label",), file)
    if isinstance(label, list):
        return label
    if not fits(label):
        what = f"column {label!r} is {schema.field(label).type}, neither numbers nor text"
        raise UserError(what, where=file, fix=f"Choose another: '{spec.base}#label=COLUMN'")
    return [label]


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind)


def class_names_of(schema: Any, column: str) -> list[str] | None:
    """Returns a column's class names from the schema's Hugging Face metadata, also of lists."""
    try:
        described = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = described["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature  # several labels per image
        feature = feature["feature"] if feature.get("_type") in _LISTS else feature
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list else None


class ParquetImages:
    """The images of one split, read as described above.

    `groups`, int64 (num_groups, 3), holds file, number and first image of each row group.
    """

    def __init__(self, files: list[str], column: str, groups: np.ndarray, num_images: int) -> None:
        self._files, self._column, self._groups = files, column, groups
        self._num_images = num_images
        self.columns: dict[str, str | None] = {}  # by role
        self._held: PackedBytes | None = None
        self._kept: dict[int, list[bytes]] = {}
        self._opened: tuple[int, int, Any] | None = None  # process, file, reader

    def __len__(self) -> int:
        return self._num_images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_opened": None}

    def item_name(self, index: int) -> str:
        file = int(self._groups[self._group_of(index), 0])
        first = int(self._groups[self._groups[:, 0] == file][0, 2])
        return f"{self._files[file]}[{index - first}]"

    def read(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._held is not None:
            data = self._held[index]
        else:
            group = self._group_of(index)
            if group not in self._kept:
                kept = [*self._kept.items()][1 - _GROUPS_KEPT :]
                self._kept = {**dict(kept), group: self._read_group(group)}
            data = self._kept[group][index - int(self._groups[group, 2])]
        if not data:
            raise UserError("the row has no image", where=self.item_name(index))
        return data

    def hold(self) -> bool:
        """Reads the images into memory unless too large; returns whether it did."""
        if self._held is None and sum(map(os.path.getsize, self._files)) <= HELD_BYTES:
            held = PackedBytes(self._up_to(HELD_BYTES))
            self._held = held if len(held) == len(self) else None
            self._opened = None
        return self._held is not None

    def _up_to(self, most: int) -> Iterator[bytes]:
        """Yields the images up to that many bytes; a file may store duplicates only once."""
        for group in range(len(self._groups)):
            for data in self._read_group(group):
                most -= len(data)
                if most < 0:
                    return
                yield data

    def values_of(self, column: str) -> list[Any] | None:
        """Returns another column's values, or the images' "path"; None if a file lacks it."""
        found = f"{self._column}.path" if column == "path" else self.columns.get(column, column)
        if found is None:
            return None
        values: list[Any] = []
        for file in self._files:
            with _damage_reported(file):
                table = open_file(file).read(columns=[found], use_threads=False).flatten()
            if not table.num_columns:
                return None
            values += table.column(0).to_pylist()
        return values

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._groups[:, 2], index, side="right")) - 1

    def _read_group(self, group: int) -> list[bytes]:
        file, number, start = self._groups[group].tolist()
        where = f"{self._files[file]}, row group {number}, from row {self.item_name(start)}"
        with _damage_reported(where):
            wanted = [f"{self._column}.bytes"]
            table = self._reader(file).read_row_group(number, columns=wanted, use_threads=False)
        return [data or b"" for data in table.flatten().column(0).to_pylist()]

    def _reader(self, file: int) -> Any:
        if self._opened is None or self._opened[:2] != (os.getpid(), file):
            self._opened = (os.getpid(), file, open_file(self._files[file]))
        return self._opened[2]


def open_file(file: str) -> Any:
    """Returns pyarrow's reader for a Parquet file."""
    what = "reading Parquet files needs pyarrow"
    parquet = optional("pyarrow.parquet", "data", what, file)
    with _damage_reported(file):
        # Without threads, for use in forked workers.
        return parquet.ParquetFile(file, memory_map=False, pre_buffer=False)


@contextmanager
def _damage_reported(where: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        fix = "Fetch or write the file again"
        raise UserError(f"cannot read the Parquet file: {reason}", where=where, fix=fix) from error


KIND = Kind(
    "Parquet files",
    lambda spec: bool(parquet_files(spec)),
    open_parquet,
    (*LABEL_OPTIONS, "image", GROUP),
)
