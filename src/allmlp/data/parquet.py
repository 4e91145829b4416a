"""Parquet files in the Hugging Face image layout: a column struct<bytes, path> and one of labels.

The classes have the names that the metadata of the file gives them, else the values of the column,
sorted. How the images are read is in `parquet_images`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.classes import check_labels, labels_of_values, natural_order
from allmlp.data.folders import SPLIT_FOLDERS, split_of_file
from allmlp.data.items import no_labels
from allmlp.data.parquet_images import ParquetImages, damage_told, open_file
from allmlp.data.source_names import LABEL_COLUMNS, SourceName, choose_column
from allmlp.errors import UserError
from allmlp.io import parse_json


def open_parquet(
    files: list[Path], name: SourceName, *, labels: bool = True
) -> dict[str, ParquetImages]:
    """Returns the splits of Parquet files, by the words in the files' names; no image is read.

    Args:
        files: at least one; files without a word for a split are train.
        name: the source's own, with the columns as options.
        labels: whether they are needed; without them no column of labels is looked for.

    Raises:
        UserError: pyarrow is not installed, a file is damaged or has not the columns, or a cell of
            the labels stands for no class (see `label_text`).
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
            columns += reader.read(columns=[label], use_threads=False).column(label).chunks
    if not any(map(len, columns)):
        raise UserError("the files have no rows", where=", ".join(files[:3]))
    values = pa.chunked_array(columns)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    source = ParquetImages(title, [], np.zeros(len(values), np.int64), files, column, table)
    if names is not None and not values.null_count:
        if not pa.types.is_integer(values.type):
            what = f"the labels are {values.type}, and the file's metadata says classes by number"
            raise UserError(what, where=files[0], fix="Choose another column: SOURCE#label=COLUMN")
        labels = check_labels(values.to_numpy(), names, source.item_name)
    else:
        encoded = values.combine_chunks().dictionary_encode(null_encoding="encode")
        codes, distinct = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
        if distinct == [-1]:
            return None
        labels, names = labels_of_values(codes, distinct, source.item_name)
    if labels is None:
        return None
    source.class_names, source.labels = names, labels
    return source


def _image_column(schema: Any, name: SourceName, file: str) -> str:
    import pyarrow.types as types

    def is_image(kind: Any) -> bool:
        return types.is_struct(kind) and any(
            part.name == "bytes"
            and (types.is_binary(part.type) or types.is_large_binary(part.type))
            for part in kind
        )

    images = [field.name for field in schema if is_image(field.type)]
    named = [each for each in schema.names if each in ("image", "img")]
    column = choose_column("image", name, schema.names, images or named, ("image", "img"), file)
    if column not in images:
        what = f"column {column!r} is {schema.field(column).type}, not struct<bytes: binary, path>"
        raise UserError(what, where=file, fix="Give a file in the Hugging Face image layout")
    return column


def _columns(schema: Any, name: SourceName, file: str) -> tuple[str, str]:
    """The columns of the images and of the labels."""
    import pyarrow.types as types

    column = _image_column(schema, name, file)

    def fits(name: str) -> bool:
        kind = schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        is_text = types.is_string(kind) or types.is_large_string(kind)
        is_number = types.is_integer(kind) or types.is_floating(kind)
        return is_text or is_number or types.is_boolean(kind)

    classes = [each for each in schema.names if class_names_of(schema, each) is not None]
    named = [each for each in schema.names if each.casefold() in LABEL_COLUMNS]
    chosen = classes or list(filter(fits, named)) or named
    label = choose_column("label", name, schema.names, chosen, ("label",), file)
    if not fits(label):
        what = f"column {label!r} is {schema.field(label).type}, neither numbers nor text"
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
