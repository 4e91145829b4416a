"""Parquet files in the Hugging Face image layout: a struct<bytes, path> column and a label column.

A split of up to `HELD_BYTES` is held in memory, shared by forked workers. A larger one is read by
row group: fast in order, but in random order every image costs a whole group.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.classes import RawLabels, numbered
from allmlp.data.source import GROUP, Images, PackedBytes
from allmlp.data.source_spec import LABEL_OPTIONS, Kind, Records, SourceSpec, by_split
from allmlp.data.sources.columns import LABEL_COLUMNS, Rows, choose_column, open_rows
from allmlp.errors import UserError
from allmlp.io import parse_json
from allmlp.names import import_extra

HELD_BYTES = 2**30  # encoded images per split
_GROUPS_KEPT = 2  # row groups cached if a split is not held in memory


def parquet_files(spec: SourceSpec) -> list[Path]:
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
    files, found = by_split(parquet_files(spec)), dict[str, Records]()
    for split in files:
        images = ParquetImages(files[split], spec)
        rows = arrow_rows(images, images.column, images.schema, images.cells, images.files[0])
        own = open_rows(spec, rows, labels, split=None if list(files) == ["train"] else split)
        found |= {name: replace(record, prepare=images.hold) for name, record in own.items()}
    return found


def arrow_rows(
    images: Images, column: str, schema: Any, cells: Callable[[str], RawLabels], file: object
) -> Rows:
    names = schema.names
    named = [name for name in names if name.casefold() in LABEL_COLUMNS]
    fitting = [name for name in named if _holds_labels(schema.field(name).type)]
    classes = [name for name in names if class_names_of(schema, name) is not None]
    likely = classes or fitting or named
    return Rows(images, column, names, cells, likely, images.item_name, file)


def arrow_cells(values: Any, class_names: list[str] | None, column: str, file: object) -> RawLabels:
    """Returns the labels in a column, a pyarrow.ChunkedArray."""
    import pyarrow.types as types

    if not _holds_labels(values.type):
        what = f"column {column!r} is {values.type}, neither numbers nor text"
        raise UserError(what, where=file, fix="Choose another: SOURCE#label=COLUMN")
    if types.is_nested(values.type):
        rows = (row or [] for row in values.to_pylist())
        if class_names is None:
            return numbered(rows)
        known = range(len(class_names))
        return numbered([class_names[at] if at in known else None for at in row] for row in rows)
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if class_names is not None and not values.null_count and types.is_integer(values.type):
        return RawLabels(values.to_numpy(), class_names, are_classes=True)
    encoded = values.combine_chunks().dictionary_encode(null_encoding="encode")
    return RawLabels(encoded.indices.to_numpy(), encoded.dictionary.to_pylist())


def _holds_labels(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):  # several labels per image
        item = kind.value_type
        return types.is_integer(item) or types.is_string(item) or types.is_large_string(item)
    return not types.is_nested(kind) and not types.is_binary(kind) and not types.is_null(kind)


def class_names_of(schema: Any, column: str) -> list[str] | None:
    """Returns a column's class names from the schema's Hugging Face metadata, also of lists."""
    try:
        described = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = described["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature  # several labels per image
        feature = feature.get("feature", feature)
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list else None


class ParquetImages:
    """The images of one split, read as described above, and the columns beside them."""

    def __init__(self, files: list[str], spec: SourceSpec) -> None:
        self.files = files
        self.schema = open_file(files[0]).schema_arrow
        kinds = {field.name: str(field.type) for field in self.schema}
        with_bytes = re.compile(r"struct<(.*, )?bytes: \w*binary")
        images = [name for name, kind in kinds.items() if with_bytes.match(kind)]
        named = [name for name in self.schema.names if name in ("image", "img")]
        self.column = choose_column("image", spec, self.schema.names, images or named, files[0])
        if self.column not in images:
            what = f"column {self.column!r} is {kinds[self.column]}, not struct<bytes: binary, ..."
            fix = "Give a file in the Hugging Face image layout"
            raise UserError(what, where=files[0], fix=fix)
        groups: list[tuple[int, int, int]] = []  # file, number and first image of each row group
        self._num_images = 0
        for at, file in enumerate(files):
            reader = open_file(file)
            self._check_same(self.column, reader.schema_arrow, file)
            for group in range(reader.num_row_groups):
                groups.append((at, group, self._num_images))
                self._num_images += reader.metadata.row_group(group).num_rows
        if not groups:
            raise UserError("the files have no rows", where=", ".join(files[:3]))
        self._groups = np.array(groups, dtype=np.int64)
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
        return f"{self.files[file]}[{index - first}]"

    def read(self, index: int) -> bytes:
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
        if self._held is None and sum(map(os.path.getsize, self.files)) <= HELD_BYTES:
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

    def _read(self, column: str) -> list[Any]:
        """Returns a table of the column for every file, without columns if a file lacks it."""
        tables: list[Any] = []
        for file in self.files:
            with _damage_reported(file):
                tables.append(open_file(file).read(columns=[column], use_threads=False))
        return tables

    def values_of(self, column: str) -> list[Any] | None:
        """Returns another column's values, or the images' "path"; None if a file lacks it."""
        name = f"{self.column}.path" if column == "path" else column
        tables = [table.flatten() for table in self._read(name)]
        if not all(table.num_columns for table in tables):
            return None
        return [value for table in tables for value in table.column(0).to_pylist()]

    def cells(self, column: str) -> RawLabels:
        """Reads a column, which has one type and the same classes in all files."""
        import pyarrow as pa

        for file in self.files:
            self._check_same(column, open_file(file).schema_arrow, file)
        batches = [batch for table in self._read(column) for batch in table.to_batches()]
        values = pa.Table.from_batches(batches).column(0)
        return arrow_cells(values, class_names_of(self.schema, column), column, self.files[0])

    def _check_same(self, column: str, schema: Any, file: str) -> None:
        first = self.files[0]
        kind, other = (
            s.field(column).type if column in s.names else None for s in (self.schema, schema)
        )
        what = f"column {column!r} is {other} here and {kind} in {first}"
        if kind == other:
            if class_names_of(self.schema, column) == class_names_of(schema, column):
                return
            what = f"column {column!r} has other classes than in {first}"
        raise UserError(what, where=file, fix="Give files that belong together")

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._groups[:, 2], index, side="right")) - 1

    def _read_group(self, group: int) -> list[bytes]:
        file, number, start = self._groups[group].tolist()
        where = f"{self.files[file]}, row group {number}, from row {self.item_name(start)}"
        with _damage_reported(where):
            wanted = [f"{self.column}.bytes"]
            table = self._reader(file).read_row_group(number, columns=wanted, use_threads=False)
        return [data or b"" for data in table.flatten().column(0).to_pylist()]

    def _reader(self, file: int) -> Any:
        if self._opened is None or self._opened[:2] != (os.getpid(), file):
            self._opened = (os.getpid(), file, open_file(self.files[file]))
        return self._opened[2]


def open_file(file: str) -> Any:
    parquet = import_extra("pyarrow.parquet", "data", "reading Parquet files needs pyarrow", file)
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
