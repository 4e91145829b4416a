"""Rows of predictions, computed in batches and streamed to a table.

The columns of CSV and Parquet are path; answer, if it can differ from class_1; class_1,
probability_1, class_2, ... or feature_0, feature_1, ... (Parquet: one list column, features) and
neighbor_1, row_1, similarity_1, ...; and error.

Shapes: N images per batch, K classes, C features.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from allmlp.data.source import Source
from allmlp.decision import Decision
from allmlp.deploy.neighbors import Neighbor, Neighborhood, read_features
from allmlp.errors import UserError
from allmlp.evaluation.features import check_features
from allmlp.evaluation.predictor import Predictor
from allmlp.io import atomic_write, path_in_errors
from allmlp.models.layers import Classifier, classes_of
from allmlp.names import import_extra

NOT_FINITE = "the model's numbers for this image are not finite"
_ROW_GROUP = 2**20  # numbers per Parquet row group held in memory


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        path: the image.
        classes: (class name, probability), most probable first; empty for a bad image.
        error: why there is no prediction; None for a good image.
        features: float32 (C,), if requested.
        neighbors: the nearest images (path, row, similarity), if requested.
        answers: the class, none if the model is unsure; or any number, with several labels.
    """

    path: str
    classes: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None
    features: np.ndarray | None = field(default=None, compare=False, repr=False)
    neighbors: list[Neighbor] = field(default_factory=list)
    answers: list[str] = field(default_factory=list, compare=False)


Rows = list[Prediction]


@dataclass(frozen=True)
class Columns:
    """Contents of a row: the `width` most probable classes, or the features."""

    width: int
    features: bool = False
    decision: Decision = field(default_factory=Decision)
    neighbors: int = 0
    reference: Neighborhood | None = None  # None: the images themselves

    def names(self) -> list[str]:
        """Returns the column names of a flat table."""
        if self.features:
            return [f"feature_{at}" for at in range(self.width)] + self.neighbor_names()
        ranks = range(1, self.width + 1)
        names = [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")]
        return ["answer", *names] if self.decision.has_answer else names

    def cells(self, row: Prediction) -> list[Any]:
        """Returns the answer, classes and probabilities of a row; [] for a bad image."""
        found = [cell for pair in row.classes for cell in pair]
        has_answer = self.decision.has_answer and row.error is None
        return [self.decision.text(row.answers), *found] if has_answer else found

    def answer(self, row: Prediction) -> dict[str, Any]:
        """Returns {"answer": text} or, with several labels, {"answers": list}, as in JSON rows."""
        if row.error is not None or not self.decision.has_answer:
            return {}
        if self.decision.labels == "multi":
            return {"answers": row.answers}
        return {"answer": self.decision.text(row.answers)}

    def neighbor_names(self) -> list[str]:
        ranks = range(1, self.neighbors + 1)
        return [f"{name}_{rank}" for rank in ranks for name in ("neighbor", "row", "similarity")]

    def find(self, rows: Rows, *, among: bool = False) -> Rows:
        """Adds the neighbours to rows: in the reference, or with `among` in the rows themselves."""
        good = [(row, values) for row in rows if (values := row.features) is not None]
        index, wanted = self.reference, None
        if among:
            index = Neighborhood([row.path for row in rows], [row.features for row in rows])
        elif index is not None and good:
            wanted = np.stack([values for _, values in good])
        else:
            return rows
        for (row, _), neighbors in zip(good, index.search(wanted, self.neighbors), strict=True):
            row.neighbors.extend(neighbors)
        return rows


def choose_columns(
    model: Classifier,
    *,
    top_k: int | None = None,
    features: bool = False,
    unsure_below: float | None = None,
    neighbors: int | None = None,
    reference: str | Path | None = None,
) -> Columns:
    """Returns a model's columns: top_k classes (5 by default, at most all) or features."""
    if not features:
        width = min(top_k or 5, len(classes_of(model, or_numbers=True)))
        return Columns(width, decision=model.decision.with_threshold(unsure_below))
    width, index = check_features(model).config.hidden_dim, None
    if reference is not None:
        index = read_features(reference)
        if index.width != width:
            what = f"the reference has {index.width} features per image, the model {width}"
            raise UserError(what, where=reference, fix="Write it with this model")
    return Columns(width, True, neighbors=neighbors or 0, reference=index)


def row_values(predictor: Predictor, columns: Columns) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Returns a function from uint8 images (N, channels, H, W) to row values.

    Sorted probabilities or features, float32 (N, width); classes, int64 (N, width or 0); which
    classes are answers, bool (N, K or 0); and whether the outputs are finite, bool (N,).
    """

    def classes(images: Tensor) -> tuple[Tensor, ...]:
        logits = predictor.logits(images)
        # Stable sort, because torch.topk breaks ties arbitrarily.
        probabilities = columns.decision.probabilities(logits)
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        width, answers = columns.width, torch.empty(len(logits), 0)
        if columns.decision.has_answer:
            answers = columns.decision.answers(probabilities)
        return ordered[:, :width], order[:, :width], answers, logits.isfinite().all(dim=1)

    def features(images: Tensor) -> tuple[Tensor, ...]:
        values = predictor.features(images)
        none = torch.empty(len(values), 0, dtype=torch.int64)
        return values, none, none, values.isfinite().all(dim=1)

    return features if columns.features else classes


def predict_rows(
    predictor: Predictor, source: Source, columns: Columns
) -> Generator[Rows, None, None]:
    """Yields a row for every image, in order, in batches."""
    names = [] if columns.features else classes_of(predictor.model, or_numbers=True)
    for batch in predictor.run(source, row_values(predictor, columns)):
        rows = {image.index: Prediction(image.name, error=image.what) for image in batch.bad}
        numbers = zip(batch.indices.tolist(), *batch.values, strict=bool(batch.values))
        for index, values, order, chosen, finite in numbers:
            path = source.item_name(index)
            if not finite:
                rows[index] = Prediction(path, error=NOT_FINITE)
            elif columns.features:
                rows[index] = Prediction(path, features=values)
            else:
                pairs = zip(order.tolist(), values.tolist(), strict=True)
                classes = [(names[k], value) for k, value in pairs]
                answers = [names[k] for k in np.flatnonzero(chosen)]
                if not columns.decision.has_answer:
                    answers = [classes[0][0]]
                rows[index] = Prediction(path, classes, answers=answers)
        yield columns.find([rows[index] for index in sorted(rows)])


# --- tables ---------------------------------------------------------------------------------------


def check_table(suffix: str) -> None:
    """Raises UserError for a format whose package is not installed."""
    if suffix == ".parquet":
        import_extra("pyarrow.parquet", "data")


def write_table(path: Path | None, suffix: str, batches: Iterable[Rows], columns: Columns) -> None:
    """Writes rows atomically, one batch in memory at a time; without a path, to standard output."""

    def write(partial: Path) -> None:
        if suffix == ".parquet":
            _write_parquet(partial, batches, columns)
        else:
            with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                _WRITERS[suffix](file, batches, columns)

    if path is not None:
        with writing(path):
            atomic_write(path, write)
        return
    with path_in_errors(Path("standard output")):
        _WRITERS[suffix](sys.stdout, batches, columns)
        sys.stdout.flush()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns disk errors into a UserError."""
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
        for row in rows:
            if row.features is not None:
                cells = [str(value) for value in row.features]  # shortest float32 representation
                cells += [str(cell) for neighbor in row.neighbors for cell in neighbor]
            else:
                cells = columns.cells(row)
                cells = [f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells]
            cells += [""] * (len(names) - len(cells))
            writer.writerow([row.path, *cells, row.error or ""])


def _write_jsonl(file: TextIO, batches: Iterable[Rows], columns: Columns) -> None:
    for rows in batches:
        file.writelines(f"{json.dumps(row_json(row, columns))}\n" for row in rows)


def _write_json(file: TextIO, batches: Iterable[Rows], columns: Columns) -> None:
    before = "[\n  "
    for rows in batches:
        for row in rows:
            text = json.dumps(row_json(row, columns), indent=2).replace("\n", "\n  ")
            file.write(f"{before}{text}")
            before = ",\n  "
    file.write("[]\n" if before[0] == "[" else "\n]\n")


_WRITERS = {".csv": _write_csv, ".json": _write_json, ".jsonl": _write_jsonl}


def row_json(row: Prediction, columns: Columns) -> dict[str, Any]:
    """Returns a row as JSON values."""
    values: dict[str, Any] = {"path": row.path}
    if columns.features:
        numbers = [] if row.features is None else row.features
        values["features"] = [float(str(number)) for number in numbers]
        if columns.neighbors:
            values["neighbors"] = [neighbor._asdict() for neighbor in row.neighbors]
    else:
        values["classes"] = [{"class": name, "probability": value} for name, value in row.classes]
        values |= columns.answer(row)
    if row.error is not None:
        values["error"] = row.error
    return values


def _write_parquet(path: Path, batches: Iterable[Rows], columns: Columns) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    names = ["features", *columns.neighbor_names()] if columns.features else columns.names()
    kinds = {"class": pa.string(), "probability": pa.float32(), "features": pa.list_(pa.float32())}
    kinds |= {"answer": pa.string(), "neighbor": pa.string(), "row": pa.int64()}
    kinds["similarity"] = pa.float32()
    middle = [(name, kinds[name.partition("_")[0]]) for name in names]
    schema = pa.schema([("path", pa.string()), *middle, ("error", pa.string())])

    def flat(row: Prediction) -> dict[str, Any]:
        near = [cell for n in row.neighbors for cell in (_as_text(n.path), *n[1:])]
        values = [row.features, *near] if columns.features else columns.cells(row)
        texts = {"path": _as_text(row.path), "error": row.error and _as_text(row.error)}
        return {**texts, **dict(zip(names, values, strict=False))}

    with parquet.ParquetWriter(path, schema) as writer:
        gathered: list[dict[str, Any]] = []  # row groups have a fixed cost
        for rows in batches:
            gathered += map(flat, rows)
            if len(gathered) >= max(1, _ROW_GROUP // (columns.width + 1)):
                writer.write_table(pa.Table.from_pylist(gathered, schema))
                gathered.clear()
        if gathered:
            writer.write_table(pa.Table.from_pylist(gathered, schema))


def _as_text(text: str) -> str:
    """Escapes bytes of a path that are not UTF-8 as \\xff, since Parquet accepts text only."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
