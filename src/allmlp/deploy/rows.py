"""Rows of predictions, computed in batches and streamed to a table (columns: docs/predict.md).

Shapes: N images per batch, K classes, C features.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from allmlp.data.source import Source
from allmlp.decision import Decision
from allmlp.errors import disk_errors
from allmlp.evaluation.features import check_features
from allmlp.evaluation.predictor import Predictor
from allmlp.io import atomic_write, path_in_errors
from allmlp.models.layers import Classifier, check_trained, classes_of

NOT_FINITE = "the model's numbers for this image are not finite"
CANNOT_WRITE = "cannot write the predictions"
FORMATS = (".csv", ".jsonl", ".parquet")
_ROW_GROUP = 2**20  # numbers per Parquet row group held in memory
_AT_ONCE = 2**24  # similarities in memory
_NEIGHBOR = ("neighbor", "row", "similarity")


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        path: the image.
        classes: (class name, probability), most probable first; empty for a bad image.
        error: why there is no prediction; None for a good image.
        features: float32 (C,), if requested.
        neighbors: the nearest images (path, row from 0, cosine similarity), if requested.
        answers: the class, none if the model is unsure; or any number, with several labels.
    """

    path: str
    classes: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None
    features: np.ndarray | None = field(default=None, compare=False, repr=False)
    neighbors: list[tuple[str, int, float]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list, compare=False)


Rows = list[Prediction]


@dataclass(frozen=True)
class Columns:
    """Contents of a row: the `width` most probable classes, or the features."""

    width: int
    features: bool = False
    decision: Decision = field(default_factory=Decision)
    neighbors: int = 0

    def names(self, *, as_list: bool = False) -> list[str]:
        """Returns the names between path and error; with `as_list` the features are one column."""
        ranks = range(1, (self.neighbors if self.features else self.width) + 1)
        if self.features:
            values = ["features"] if as_list else [f"feature_{at}" for at in range(self.width)]
            return values + [f"{name}_{r}" for r in ranks for name in _NEIGHBOR]
        names = [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")]
        return ["answer", *names] if self.decision.has_answer else names

    def cells(self, row: Prediction, *, as_list: bool = False) -> list[Any]:
        if row.features is not None:
            values = [row.features] if as_list else [str(value) for value in row.features]  # exact
            return values + [cell for neighbor in row.neighbors for cell in neighbor]
        cells = [cell for pair in row.classes for cell in pair]
        has_answer = self.decision.has_answer and row.error is None
        return [self.decision.text(row.answers), *cells] if has_answer else cells

    def answer(self, row: Prediction) -> dict[str, Any]:
        """Returns {"answer": text} or, with several labels, {"answers": list}, as in JSON rows."""
        if row.error is not None or not self.decision.has_answer:
            return {}
        if self.decision.labels == "multi":
            return {"answers": row.answers}
        return {"answer": self.decision.text(row.answers)}


def choose_columns(
    model: Classifier,
    top_k: int | None = None,
    unsure_below: float | None = None,
    features: bool = False,
    neighbors: int | None = None,
) -> Columns:
    """Returns a model's columns: top_k classes (5 by default, at most all) or features."""
    if features:
        return Columns(check_features(model).config.hidden_dim, True, neighbors=neighbors or 0)
    check_trained(model)
    width = min(top_k or 5, len(classes_of(model, or_numbers=True)))
    return Columns(width, decision=model.decision.with_threshold(unsure_below))


def add_neighbors(rows: Rows, number: int) -> None:
    """Adds to each row the most similar other rows, nearest first, equally near ones in order."""
    good = [(at, values) for at, row in enumerate(rows) if (values := row.features) is not None]
    number = min(number, len(good) - 1)
    if number < 1:
        return
    units = F.normalize(torch.from_numpy(np.stack([values for _, values in good])))
    step = max(1, _AT_ONCE // len(good))
    for start in range(0, len(good), step):
        # Rounded, because products of equal rows may differ in the last bit.
        similar = (units[start : start + step] @ units.T).round(decimals=6)
        own = torch.arange(len(similar))
        similar[own, start + own] = -torch.inf
        least = similar.topk(number, dim=1).values[:, -1:].numpy()
        for at, values in enumerate(similar.numpy()):
            near = np.flatnonzero(values >= least[at])  # including ties
            for one in near[np.argsort(-values[near], kind="stable")][:number]:
                row, similarity = good[one][0], round(float(values[one]), 6)
                rows[good[start + at][0]].neighbors.append((rows[row].path, row, similarity))


def row_values(predictor: Predictor, columns: Columns) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Returns a function from uint8 images (N, channels, H, W) to sorted probabilities or features
    (N, width), classes (N, width or 0), which classes are answers (N, K or 0), and are_finite (N,).
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
    predictor: Predictor,
    source: Source,
    columns: Columns,
    on_rows: Callable[[Rows], object] = lambda rows: None,
) -> Generator[Rows, None, None]:
    """Yields a row for every image, in order, in batches, with which `on_rows` is called first."""
    names = [] if columns.features else classes_of(predictor.model, or_numbers=True)
    for batch in predictor.run(source, row_values(predictor, columns)):
        found = {image.index: Prediction(image.name, error=image.what) for image in batch.bad}
        numbers = zip(batch.indices.tolist(), *batch.values, strict=bool(batch.values))
        for index, values, order, chosen, finite in numbers:
            path = source.item_name(index)
            if not finite:
                found[index] = Prediction(path, error=NOT_FINITE)
            elif columns.features:
                found[index] = Prediction(path, features=values)
            else:
                pairs = zip(order.tolist(), values.tolist(), strict=True)
                classes = [(names[k], value) for k, value in pairs]
                answers = [names[k] for k in np.flatnonzero(chosen)]
                if not columns.decision.has_answer:
                    answers = [classes[0][0]]
                found[index] = Prediction(path, classes, answers=answers)
        rows = [found[index] for index in sorted(found)]
        on_rows(rows)
        yield rows


# --- tables ---------------------------------------------------------------------------------------


def write_table(path: Path | None, suffix: str, batches: Iterable[Rows], columns: Columns) -> None:
    """Writes rows atomically, one batch in memory at a time; without a path, to standard output."""

    rows = chain.from_iterable(batches)

    def write(partial: Path) -> None:
        if suffix == ".parquet":
            _write_parquet(partial, rows, columns)
        else:
            with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                _WRITERS[suffix](file, rows, columns)

    if path is not None:
        with disk_errors(CANNOT_WRITE, path):
            atomic_write(path, write)
        return
    with path_in_errors(Path("standard output")):
        _WRITERS[suffix](sys.stdout, rows, columns)
        sys.stdout.flush()


def _write_csv(file: TextIO, rows: Iterable[Prediction], columns: Columns) -> None:
    names = columns.names()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", *names, "error"])
    digits = "" if columns.features else ".6f"
    for row in rows:
        cells = columns.cells(row)
        cells = [f"{cell:{digits}}" if isinstance(cell, float) else cell for cell in cells]
        cells += [""] * (len(names) - len(cells))
        writer.writerow([row.path, *cells, row.error or ""])


def _write_jsonl(file: TextIO, rows: Iterable[Prediction], columns: Columns) -> None:
    file.writelines(f"{json.dumps(row_json(row, columns))}\n" for row in rows)


_WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl}


def row_json(row: Prediction, columns: Columns) -> dict[str, Any]:
    values: dict[str, Any] = {"path": row.path}
    if columns.features:
        numbers = [] if row.features is None else row.features
        values["features"] = [float(str(number)) for number in numbers]
        if columns.neighbors:
            values["neighbors"] = [
                dict(zip(("path", *_NEIGHBOR[1:]), near, strict=True)) for near in row.neighbors
            ]
    else:
        values["classes"] = [{"class": name, "probability": value} for name, value in row.classes]
        values |= columns.answer(row)
    if row.error is not None:
        values["error"] = row.error
    return values


def _write_parquet(path: Path, rows: Iterable[Prediction], columns: Columns) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"features": pa.list_(pa.float32()), "row": pa.int64()}
    kinds |= dict.fromkeys(("probability", "similarity"), pa.float32())
    names = ["path", *columns.names(as_list=True), "error"]
    kinds_of = [kinds.get(name.partition("_")[0], pa.string()) for name in names]
    schema = pa.schema(list(zip(names, kinds_of, strict=True)))

    def record(row: Prediction) -> dict[str, Any]:
        cells = zip(names, [row.path, *columns.cells(row, as_list=True)], strict=False)
        values = {**dict(cells), "error": row.error}
        return {name: _as_text(v) if isinstance(v, str) else v for name, v in values.items()}

    with parquet.ParquetWriter(path, schema) as writer:
        records = map(record, rows)
        size = max(1, _ROW_GROUP // (columns.width + 1))  # row groups have a fixed cost
        while group := list(islice(records, size)):
            writer.write_table(pa.Table.from_pylist(group, schema))


def _as_text(text: str) -> str:
    """Escapes bytes of a path that are not UTF-8 as \\xff, since Parquet accepts text only."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
