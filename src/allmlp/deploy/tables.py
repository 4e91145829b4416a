"""Rows of predictions as CSV, JSON, JSON lines or Parquet, written as they come.

CSV and Parquet have the columns path, then class_1, probability_1, class_2, ... or feature_0,
feature_1, ... (Parquet: one column of lists, features), then error.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from allmlp.deploy.rows import Columns, Prediction, Rows
from allmlp.errors import UserError
from allmlp.io import atomic_write, path_in_errors
from allmlp.names import extra

_ROW_GROUP = 2**20  # numbers in a row group of Parquet: what is held in memory


def check_table(suffix: str) -> None:
    """Raises UserError for a format whose package is not installed."""
    if suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError as error:
            fix = f"{extra('data')}, or write .csv or .jsonl"
            what = "writing Parquet needs pyarrow"
            raise UserError(what, fix=fix, code="missing-package") from error


def write_table(
    path: Path | None,
    suffix: str,
    batches: Iterable[Rows],
    columns: Columns,
    finish: Callable[[], None] | None = None,
) -> None:
    """Writes rows atomically, one batch in memory at a time; to standard output without a path.

    `finish` is called once all rows are written, before the file has its name.
    """
    write = WRITERS[suffix]

    def write_file(partial: Path) -> None:
        if suffix == ".parquet":
            write(partial, batches, columns)
        else:
            with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                write(file, batches, columns)
        if finish is not None:
            finish()

    if path is None:
        with path_in_errors(Path("standard output")):
            write(sys.stdout, batches, columns)
            sys.stdout.flush()
        return
    with writing(path):
        atomic_write(path, write_file)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the disk into a UserError."""
    try:
        yield
    except OSError as error:
        what = f"cannot write the predictions: {error.strerror or error}"
        raise UserError(what, where=path, fix="Give another output", code="disk") from error


def _write_csv(file: TextIO, batches: Iterable[Rows], columns: Columns) -> None:
    names = columns.names()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", *names, "error"])
    for rows in batches:
        writer.writerows(_cells(row, len(names)) for row in rows)


def _cells(row: Prediction, number: int) -> list[str]:
    if row.features is not None:
        cells = [str(value) for value in row.features]  # a float32 in the fewest digits
    else:
        cells = [cell for name, value in row.classes for cell in (name, f"{value:.6f}")]
    return [row.path, *cells, *[""] * (number - len(cells)), row.error or ""]


def _write_jsonl(file: TextIO, batches: Iterable[Rows], columns: Columns) -> None:
    for rows in batches:
        file.writelines(f"{json.dumps(_values(row, columns))}\n" for row in rows)


def _write_json(file: TextIO, batches: Iterable[Rows], columns: Columns) -> None:
    before = "[\n  "
    for rows in batches:
        for row in rows:
            text = json.dumps(_values(row, columns), indent=2).replace("\n", "\n  ")
            file.write(f"{before}{text}")
            before = ",\n  "
    file.write("[]\n" if before[0] == "[" else "\n]\n")


def _values(row: Prediction, columns: Columns) -> dict[str, Any]:
    values: dict[str, Any] = {"path": row.path}
    if columns.features:
        numbers = [] if row.features is None else row.features
        values["features"] = [float(str(number)) for number in numbers]
    else:
        values["classes"] = [{"class": name, "probability": value} for name, value in row.classes]
    if row.error is not None:
        values["error"] = row.error
    return values


def _write_parquet(path: Path, batches: Iterable[Rows], columns: Columns) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    if columns.features:
        middle = [("features", pa.list_(pa.float32()))]
    else:
        kinds = {"class": pa.string(), "probability": pa.float32()}
        middle = [(name, kinds[name.split("_")[0]]) for name in columns.names()]
    schema = pa.schema([("path", pa.string()), *middle, ("error", pa.string())])
    with parquet.ParquetWriter(path, schema) as writer:
        gathered: Rows = []  # every row group has a cost of its own

        def flush() -> None:
            arrays = _arrays(gathered, columns)
            table = [pa.array(arrays[column.name], column.type) for column in schema]
            writer.write_table(pa.Table.from_arrays(table, schema=schema))
            gathered.clear()

        for rows in batches:
            gathered += rows
            if len(gathered) >= max(1, _ROW_GROUP // (columns.width + 1)):
                flush()
        if gathered:
            flush()


def _arrays(rows: Rows, columns: Columns) -> dict[str, list[Any]]:
    arrays: dict[str, list[Any]] = {
        "path": [_as_text(row.path) for row in rows],
        "error": [None if row.error is None else _as_text(row.error) for row in rows],
    }
    if columns.features:
        return arrays | {"features": [row.features for row in rows]}
    for rank in range(columns.width):
        pairs = [row.classes[rank] if row.classes else (None, None) for row in rows]
        arrays[f"class_{rank + 1}"] = [name for name, _ in pairs]
        arrays[f"probability_{rank + 1}"] = [value for _, value in pairs]
    return arrays


def _as_text(text: str) -> str:
    """Bytes of a path that are not UTF-8 are written as \\xff, since Parquet takes text only."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


WRITERS: dict[str, Callable[[Any, Iterable[Rows], Columns], None]] = {
    ".csv": _write_csv,
    ".json": _write_json,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
