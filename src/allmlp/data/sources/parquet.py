"""Parquet files in the Hugging Face image layout: a struct<bytes, path> column and a label column.

A split of up to `HELD_BYTES` is held in memory, shared by forked workers. A larger one is read by
row group: fast in order, but in random order every image costs a whole group.
"""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.classes import RawLabels, numbered
from allmlp.data.source import GROUP, Images, Joined, PackedBytes
from allmlp.data.source_spec import LABEL_OPTIONS, SourceSpec, by_split
from allmlp.data.sources.columns import LABEL_COLUMNS, Kind, Rows, choose_column
from allmlp.errors import UserError
from allmlp.io import parse_json
from allmlp.names import import_extra

HELD_BYTES = 2**30  # encoded images per split
Cells = Callable[[str], RawLabels]  # reads a column


def parquet_files(spec: SourceSpec) -> list[Path]:
    path = spec.path
    if path.is_dir():
        files = [*path.glob("*.parquet")] or [*path.glob("data/*.parquet")]
        return [file for file in files if file.name[0] != "."]
    if path.exists() or not glob.has_magic(spec.base):
        return [path] if path.is_file() and path.suffix.lower() == ".parquet" else []
    files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
    return files if all(file.suffix.lower() == ".parquet" for file in files) else []


def open_parquet(spec: SourceSpec, labels: bool) -> Iterator[Rows]:
    """Yields the splits, found by file name or else by a column; reads no images."""
    splits = by_split(parquet_files(spec))
    for split, files in splits.items():
        own = None if list(splits) == ["train"] else split
        schema, cells = open_file(files[0]).schema_arrow, functools.partial(labels_in, files)
        column = image_column(spec, schema, files[0])
        _row_group.cache_clear()  # a file of the same name may have replaced an earlier one
        parts, schemas = list[ParquetImages](), dict[str, Any]()
        for file in files:
            reader = open_file(file)
            schemas[file] = reader.schema_arrow
            parts.append(ParquetImages(file, column, reader.metadata))
        _check_same(schemas, column)
        if not any(map(len, parts)):
            raise UserError("the files have no rows", where=", ".join(files[:3]))
        more = {"split": own, "file": files[0], "prepare": functools.partial(hold, parts)}
        yield arrow_rows(Joined(tuple(parts)), column, schema, cells, **more)


def image_column(spec: SourceSpec, schema: Any, file: str) -> str:
    kinds = {field.name: str(field.type) for field in schema}
    images = [name for name in kinds if re.match(r"struct<(.*, )?bytes: \w*binary", kinds[name])]
    named = [name for name in kinds if name in ("image", "img")]
    column = choose_column("image", spec, schema.names, images or named, file)
    if column not in images:
        what = f"column {column!r} is {kinds[column]}, not struct<bytes: binary, ..."
        fix = f"Columns of images: {', '.join(images) or 'none'}"
        raise UserError(what, where=file, fix=fix)
    return column


def arrow_rows(images: Images, image: str, schema: Any, cells: Cells, **more: Any) -> Rows:
    names = [name for name in schema.names if name != image]
    named = [name for name in names if name.casefold() in LABEL_COLUMNS]
    fitting = [name for name in named if _holds_labels(schema.field(name).type)]
    classes = [name for name in names if class_names_of(schema, name) is not None]
    columns = {name: functools.partial(cells, name) for name in names}
    return Rows(images, columns, likely=classes or fitting or named, **more)


def arrow_cells(values: Any, class_names: list[str] | None, column: str, file: object) -> RawLabels:
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
    if class_names is not None and not values.null_count and types.is_integer(values.type):
        return RawLabels(values.to_numpy(), class_names, are_classes=True)
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
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


@dataclass
class ParquetImages:
    file: str
    column: str
    metadata: InitVar[Any]
    held: PackedBytes | None = None

    def __post_init__(self, metadata: Any) -> None:
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        # The first row of each row group, and the end.
        self.starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self.num_bytes = sum(group.total_byte_size for group in groups)  # not compressed

    def __len__(self) -> int:
        return int(self.starts[-1])

    def item_name(self, index: int) -> str:
        return f"{self.file}[{index}]"

    def read(self, index: int) -> bytes:
        if self.held is not None:
            data = self.held[index]
        else:
            group = int(np.searchsorted(self.starts, index, side="right")) - 1
            first = int(self.starts[group])
            data = _row_group(self.file, self.column, group, first)[index - first]
        if not data:
            raise UserError("the row has no image", where=self.item_name(index))
        return data

    def values_of(self, column: str) -> list[Any] | None:
        name = f"{self.column}.path" if column == "path" else column
        table = read_column(self.file, name).flatten()
        return table.column(0).to_pylist() if table.num_columns else None


def hold(parts: Sequence[ParquetImages]) -> None:
    """Reads the images into memory, unless they are too large; a file may store copies once."""
    room = HELD_BYTES

    def images(part: ParquetImages) -> Iterator[bytes]:
        nonlocal room
        for number, first in enumerate(part.starts[:-1].tolist()):
            for data in _row_group.__wrapped__(part.file, part.column, number, first):
                room -= len(data)
                if room < 0:
                    return
                yield data

    if parts[0].held is None and sum(part.num_bytes for part in parts) <= HELD_BYTES:
        held = [PackedBytes(images(part)) for part in parts]
        for part, data in zip(parts, held if room >= 0 else (), strict=False):
            part.held = data


@functools.lru_cache(maxsize=2)
def _row_group(file: str, column: str, group: int, first: int) -> list[bytes]:
    with _damage_reported(f"{file}, row group {group}, from row {file}[{first}]"):
        wanted = [f"{column}.bytes"]
        table = open_file(file).read_row_group(group, columns=wanted, use_threads=False)
    return [data or b"" for data in table.flatten().column(0).to_pylist()]


def read_column(file: str, column: str) -> Any:
    with _damage_reported(file):
        return open_file(file).read(columns=[column], use_threads=False)


def labels_in(files: list[str], column: str) -> RawLabels:
    import pyarrow as pa

    class_names = _check_same({file: open_file(file).schema_arrow for file in files}, column)
    chunks = [chunk for file in files for chunk in read_column(file, column).column(0).chunks]
    return arrow_cells(pa.chunked_array(chunks), class_names, column, files[0])


def _check_same(schemas: dict[str, Any], column: str) -> list[str] | None:
    (name, first), *others = schemas.items()
    class_names = class_names_of(first, column)
    for file, schema in others:
        kind, other = (s.field(column).type if column in s.names else None for s in (first, schema))
        what = f"column {column!r} is {other} here and {kind} in {name}"
        if kind == other:
            if class_names == class_names_of(schema, column):
                continue
            what = f"column {column!r} has other classes than in {name}"
        raise UserError(what, where=file, fix="Give files that belong together")
    return class_names


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
