"""Parquet files in the Hugging Face image layout: a column struct<bytes, path> and one of labels.

The classes have the names that the metadata of the file gives them, else the values of the column,
sorted. How the images are read is in `parquet_images`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlp_mixer.data.classes import check_labels, labels_of_values, natural_order
from mlp_mixer.data.folders import SPLIT_FOLDERS, split_of_file
from mlp_mixer.data.items import no_labels
from mlp_mixer.data.parquet_images import ParquetImages, damage_told, open_file
from mlp_mixer.data.source_names import SourceName, choose_column
from mlp_mixer.disk import parse_json
from mlp_mixer.errors import UserError

_LABEL_NAMES = ("label", "labels", "class", "target")


def open_parquet(
    files: list[Path], name: SourceName, *, labels: bool = True
) -> dict[str, ParquetImages]:
    """Returns the splits of Parquet files, by the words in the files' names; no image is read.

    Args:
        files: at least one; files without a word for a split are train.
        name: the source's own, with the columns as options.
        labels: whether they are needed; without them no column of labels is looked for.

    Raises:
        UserError: pyarrow is not installed, a file is damaged or has not the columns, or an image
            has no label.
    """
    name.refuse_options(("label", "image"), "Parquet files")
    by_split: dict[str, list[str]] = {}
    for path in sorted(files, key=lambda path: natural_order(str(path))):
        by_split.setdefault(split_of_file(path), []).append(str(path))
    found: dict[str, ParquetImages] = {}
    for split in (each for each in SPLIT_FOLDERS if each in by_split):
        title = f"{name.source}:{split}"
        opener = _open_split if labels else _open_unlabelled
        source = opener(by_split[split], name, title)
        if source is not None:
            found[split] = source
    if not found:
        raise UserError("none of the images has a label", where=name.source)
    return found


def _open_unlabelled(files: list[str], name: SourceName, title: str) -> ParquetImages:
    first = open_file(files[0]).schema_arrow
    column = _image_column(first, name, files[0])
    table = _groups(files, (column,))
    rows = sum(open_file(file).metadata.num_rows for file in files)
    if rows == 0:
        raise UserError("the files have no rows", where=", ".join(files[:3]))
    return ParquetImages(title, *no_labels(rows), files, column, table)


def _groups(files: list[str], wanted: tuple[str, ...]) -> np.ndarray:
    """The row groups of files that belong together, as `ParquetImages` takes them."""
    kinds = open_file(files[0]).schema_arrow
    groups: list[tuple[int, int, int]] = []
    row = 0
    for at, file in enumerate(files):
        reader = open_file(file)
        for each in wanted:
            kind = kinds.field(each).type
            other = each in reader.schema_arrow.names and reader.schema_arrow.field(each).type
            if other != kind:
                what = f"column {each!r} is {other or 'missing'} here and {kind} in {files[0]}"
                raise UserError(what, where=file, fix="Give files that belong together")
        for group in range(reader.num_row_groups):
            groups.append((at, group, row))
            row += reader.metadata.row_group(group).num_rows
    return np.array(groups, dtype=np.int64).reshape(-1, 3)


def _open_split(files: list[str], name: SourceName, title: str) -> ParquetImages | None:
    import pyarrow as pa

    first = open_file(files[0])
    column, label = _columns(first.schema_arrow, name, files[0])
    names = class_names_of(first.schema_arrow, label)
    table, columns = _groups(files, (column, label)), []
    for file in files:
        reader = open_file(file)
        if class_names_of(reader.schema_arrow, label) != names:
            what = f"column {label!r} has other classes than in {files[0]}"
            raise UserError(what, where=file, fix="Give files that belong together")
        with damage_told(file):
            column_of_labels = reader.read(columns=[label], use_threads=False).column(label)
        if column_of_labels.null_count:
            null = int(np.flatnonzero(column_of_labels.is_null().to_numpy())[0])
            raise UserError(f"the row has no {label}", where=f"{file}[{null}]")
        columns += column_of_labels.chunks
    if not any(map(len, columns)):
        raise UserError("the files have no rows", where=", ".join(files[:3]))
    values = pa.chunked_array(columns).combine_chunks()
    empty = np.zeros(len(values), dtype=np.int64)
    if names is None:
        encoded = values.dictionary_encode()
        codes = np.asarray(encoded.indices.to_numpy(zero_copy_only=False))
        labels, names = labels_of_values(codes, encoded.dictionary.to_pylist())
        return ParquetImages(title, names, labels, files, column, table)
    item_name = ParquetImages(title, names, empty, files, column, table).item_name
    if not pa.types.is_integer(values.type):
        what = f"the labels are {values.type}, and the file's metadata says classes by number"
        raise UserError(what, where=files[0], fix="Choose another column: SOURCE#label=COLUMN")
    checked = check_labels(values.to_numpy(zero_copy_only=False), names, item_name)
    return None if checked is None else ParquetImages(title, names, checked, files, column, table)


def _image_column(schema: Any, name: SourceName, file: str) -> str:
    import pyarrow.types as types

    def is_image(kind: Any) -> bool:
        return types.is_struct(kind) and any(
            part.name == "bytes"
            and (types.is_binary(part.type) or types.is_large_binary(part.type))
            for part in kind
        )

    images = [field.name for field in schema if is_image(field.type)]
    column = choose_column("image", name, schema.names, images, ("image", "img"), file)
    if column not in images:
        what = f"column {column!r} is {schema.field(column).type}, not struct<bytes: binary, path>"
        raise UserError(what, where=file, fix="Give a file in the Hugging Face image layout")
    return column


def _columns(schema: Any, name: SourceName, file: str) -> tuple[str, str]:
    """The columns of the images and of the labels."""
    import pyarrow.types as types

    column = _image_column(schema, name, file)
    kinds = {field.name: field.type for field in schema}
    fitting = {
        each: types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)
        for each, kind in kinds.items()
    }
    classes = [each for each in schema.names if class_names_of(schema, each) is not None]
    named = [each for each in schema.names if fitting[each] and each.casefold() in _LABEL_NAMES]
    label = choose_column("label", name, schema.names, classes or named, ("label",), file)
    if not fitting[label]:
        what = f"column {label!r} is {kinds[label]}, neither integers nor text"
        raise UserError(what, where=file, fix=f"Choose another: '{name.base}#label=COLUMN'")
    return column, label


def class_names_of(schema: Any, column: str) -> list[str] | None:
    """Returns the names that the Hugging Face metadata of a schema gives a column's classes."""
    try:
        described = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = described["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (ValueError, LookupError, TypeError):
        return None
    is_list = isinstance(names, list) and all(isinstance(each, str) for each in names)
    return names if is_list else None
