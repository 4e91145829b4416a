"""Rows of predictions as CSV, JSON, JSON lines or Parquet, written as they come.

CSV and Parquet have the columns path, then class_1, probability_1, class_2, ... or feature_0,
feature_1, ... (Parquet: one column of lists, features), then error.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from allmlp.deploy.answers import Question
from allmlp.deploy.rows import Prediction, Rows
from allmlp.errors import UserError
from allmlp.io import atomic_write, path_in_errors
from allmlp.names import extra

FILE_FORMATS = (".csv", ".json", ".jsonl", ".parquet")
PART_FORMATS = ("csv", "jsonl", "parquet")
_ROW_GROUP = 2**20  # numbers in a row group of Parquet: what is held in memory


def check_format(suffix: str) -> None:
    """Refuses a format whose package is not installed.

    Raises:
        UserError: it is Parquet, and there is no pyarrow.
    """
    if suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError as error:
            fix = f"{extra('data')}, or write .csv or .jsonl"
            raise UserError("writing Parquet needs pyarrow", fix=fix) from error


def write_rows(
    path: Path | None,
    suffix: str,
    batches: Iterable[Rows],
    question: Question,
    then: Callable[[], None] | None = None,
) -> None:
    """Writes rows to a file, whole or not at all; a batch is in memory at a time.

    Args:
        path: of the file, whatever it is called; None writes text to standard output.
        suffix: one of `FILE_FORMATS`.
        batches: of rows.
        question: that they answer.
        then: called once all rows are written, before the file has its name.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    width, features = question.width, question.features

    def write(aside: Path) -> None:
        if suffix == ".parquet":
            _write_parquet(aside, batches, width, features)
        else:
            with aside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                write_text(file, suffix, batches, width=width, features=features)
        if then is not None:
            then()

    if path is None:
        with path_in_errors(Path("standard output")):
            write_text(sys.stdout, suffix, batches, width=width, features=features)
            sys.stdout.flush()
        return
    with writing(path):
        atomic_write(path, write)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the disk says in the block into an error of the user's."""
    try:
        yield
    except OSError as error:
        what = f"cannot write the predictions: {error.strerror or error}"
        raise UserError(what, where=path, fix="Give another --output") from error


def render(predictions: Sequence[Prediction], suffix: str) -> str:
    """Returns the predictions as the text of a .csv, .json or .jsonl file."""
    features = any(each.features is not None for each in predictions)
    widths = [
        len(each.classes) if each.features is None else len(each.features) for each in predictions
    ]
    file = io.StringIO()
    write_text(file, suffix, [list(predictions)], width=max(widths, default=0), features=features)
    return file.getvalue()


def write_text(
    file: TextIO, suffix: str, batches: Iterable[Rows], *, width: int, features: bool
) -> None:
    """Writes rows to an open file of text.

    Args:
        file: to write to.
        suffix: one of `FILE_FORMATS` but .parquet.
        batches: of rows.
        width: classes or features of a row.
        features: whether they are features.
    """
    if suffix == ".csv":
        writer = csv.writer(file, lineterminator="\n")
        columns = _columns(width, features)
        writer.writerow(["path", *columns, "error"])
        for rows in batches:
            writer.writerows(_cells(each, len(columns)) for each in rows)
    elif suffix == ".jsonl":
        for rows in batches:
            file.writelines(f"{json.dumps(_values(each, features))}\n" for each in rows)
    else:
        assert suffix == ".json", suffix
        before = "[\n  "
        for rows in batches:
            for each in rows:
                text = json.dumps(_values(each, features), indent=2).replace("\n", "\n  ")
                file.write(f"{before}{text}")
                before = ",\n  "
        file.write("[]\n" if before[0] == "[" else "\n]\n")


def _columns(width: int, features: bool) -> list[str]:
    if features:
        return [f"feature_{at}" for at in range(width)]
    ranks = range(1, width + 1)
    return [f"{column}_{rank}" for rank in ranks for column in ("class", "probability")]


def _cells(row: Prediction, columns: int) -> list[str]:
    if row.features is not None:
        found = [str(each) for each in row.features]  # of a float32: the fewest digits that are it
    else:
        found = [cell for name, share in row.classes for cell in (name, f"{share:.6f}")]
    return [row.path, *found, *[""] * (columns - len(found)), row.error or ""]


def _values(row: Prediction, features: bool) -> dict[str, Any]:
    values: dict[str, Any] = {"path": row.path}
    if features:
        numbers = [] if row.features is None else row.features
        values["features"] = [float(str(each)) for each in numbers]
    else:
        values["classes"] = [{"class": name, "probability": share} for name, share in row.classes]
    if row.error is not None:
        values["error"] = row.error
    return values


def _write_parquet(path: Path, batches: Iterable[Rows], width: int, features: bool) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    if features:
        middle = [("features", pa.list_(pa.float32()))]
    else:
        kinds = {"class": pa.string(), "probability": pa.float32()}
        middle = [(each, kinds[each.split("_")[0]]) for each in _columns(width, features)]
    schema = pa.schema([("path", pa.string()), *middle, ("error", pa.string())])
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in _gathered(batches, max(1, _ROW_GROUP // (width + 1))):
            columns = _arrays(rows, width, features)
            arrays = [pa.array(columns[each.name], each.type) for each in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _gathered(batches: Iterable[Rows], least: int) -> Iterator[Rows]:
    """The same rows in larger batches: every row group of Parquet has a cost of its own."""
    gathered: Rows = []
    for rows in batches:
        gathered += rows
        if len(gathered) >= least:
            yield gathered
            gathered = []
    if gathered:
        yield gathered


def _arrays(rows: Rows, width: int, features: bool) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "path": [_as_text(each.path) for each in rows],
        "error": [None if each.error is None else _as_text(each.error) for each in rows],
    }
    if features:
        columns["features"] = [each.features for each in rows]
    else:
        for rank in range(width):
            pairs = [each.classes[rank] if each.classes else (None, None) for each in rows]
            columns[f"class_{rank + 1}"] = [name for name, _ in pairs]
            columns[f"probability_{rank + 1}"] = [share for _, share in pairs]
    return columns


def _as_text(text: str) -> str:
    """A path may hold bytes that are no UTF-8, which Parquet refuses: they are written as \\xff."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
