"""The metrics of an evaluation: top-1, top-5, loss, calibration, per class, the confusion matrix.

All are exact counts over the images that could be decoded, from the logits as the model gave them.
A new metric is one entry of `METRICS`: whatever prints or writes metrics reads that list.

Shapes: N images, K classes, B bins.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allmlp.data.source import BadImage
from allmlp.evaluation.imagenet_real import RealScore
from allmlp.evaluation.result_file import measurement
from allmlp.io import atomic_write_all, check_output_folder
from allmlp.models.layers import ImageClassifier
from allmlp.preprocessing import Preprocessing

FILES = ("per_class.csv", "confusion.csv", "evaluation.json")  # what `Evaluation.save` writes
BINS = 15


@dataclass
class Evaluation:
    """A model's predictions for labelled images; K classes, N images that could be decoded.

    Attributes:
        data: the name of the source.
        class_names: the model's classes, K.
        labels: int64 (N,), the true classes.
        indices: int64 (N,), of the images in the source.
        probabilities: float32 (N, K), the softmax of the logits.
        bad: the images that could not be decoded.
        logits: float32 (N, K), which order the classes and give the loss: probabilities that are
            too small for float32 are all 0. None where only `probabilities` are known.
        preprocessing: from image files to inputs; None where it is unknown.
        real: the ImageNet ReaL score; None where it was not asked for.
        are_held_out: whether the images are those that the model's run held out.
        trained_on: how many of the images the model's run was trained on; None where unknown.
        precision: of the matrix products, and why; None where it is unknown.
        notes: what else to know about the metrics, a line each.
    """

    data: str
    class_names: list[str]
    labels: np.ndarray
    indices: np.ndarray
    probabilities: np.ndarray
    bad: list[BadImage] = field(default_factory=list)
    logits: np.ndarray | None = None
    preprocessing: Preprocessing | None = None
    real: RealScore | None = None
    are_held_out: bool = False
    trained_on: int | None = None
    precision: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def scores(self) -> np.ndarray:
        """float32 (N, K): what orders the classes of an image: logits, else probabilities."""
        return self.probabilities if self.logits is None else self.logits

    @property
    def predictions(self) -> np.ndarray:
        """int64 (N,): the most probable class of each image, the first of equal ones."""
        return self.scores.argmax(axis=1)

    @property
    def confidences(self) -> np.ndarray:
        """float32 (N,): the probability of each image's predicted class."""
        return self.probabilities[np.arange(len(self.labels)), self.predictions]

    @property
    def truth_probabilities(self) -> np.ndarray:
        """float32 (N,): the probability of each image's true class."""
        return self.probabilities[np.arange(len(self.labels)), self.labels]

    @property
    def correct(self) -> np.ndarray:
        """bool (N,): whether the most probable class is the true one."""
        return self.predictions == self.labels

    @property
    def top1(self) -> float:
        """Fraction of the images whose most probable class is the true one."""
        return float(self.correct.mean())

    @property
    def top5(self) -> float | None:
        """Fraction of the images with the true class among the 5 most probable; None: K <= 5."""
        if len(self.class_names) <= 5:
            return None
        scores, truth = self.scores, self.labels[:, None]
        own = np.take_along_axis(scores, truth, axis=1)
        is_before = ~(scores <= own) | ((scores == own) & (np.arange(scores.shape[1]) < truth))
        return float((is_before.sum(axis=1) < 5).mean())

    @property
    def losses(self) -> np.ndarray:
        """float64 (N,): the negative log-likelihood of each image's true class, in nats."""
        if self.logits is None:
            tiny = np.finfo(np.float32).tiny
            return -np.log(np.maximum(self.truth_probabilities, tiny)).astype(np.float64)
        found = np.empty(len(self.labels))
        for at in range(0, len(found), 1024):  # float64 copies of a few rows at a time
            rows = torch.from_numpy(self.logits[at : at + 1024]).double().log_softmax(dim=1)
            truth = torch.from_numpy(self.labels[at : at + 1024])[:, None]
            found[at : at + 1024] = -rows.gather(1, truth)[:, 0].numpy()
        return found

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the true classes, in nats."""
        return float(self.losses.mean())

    @property
    def reliability(self) -> Reliability:
        """The images by confidence; its `error` is the expected calibration error."""
        return reliability(self.confidences, self.correct)

    @property
    def confusion(self) -> np.ndarray:
        """int64 (K, K): images of the row's class that were predicted as the column's."""
        classes = len(self.class_names)
        flat = np.bincount(self.labels * classes + self.predictions, minlength=classes**2)
        return flat.reshape(classes, classes)

    def metrics(self) -> Iterator[tuple[str, float]]:
        """Yields (name, value) of the metrics that a run logs while it trains."""
        yield from self._values([metric for metric in METRICS if metric.logged])

    def figures(self) -> Iterator[tuple[str, float]]:
        """Yields (name, value) of every metric that is one number."""
        yield from self._values(METRICS)

    def _values(self, metrics: Sequence[Metric]) -> Iterator[tuple[str, float]]:
        for metric in metrics:
            value = metric.compute(self)
            if value is not None:
                yield metric.name, value

    def lines(self) -> Iterator[str]:
        """Yields the metrics as they are printed."""
        for metric in METRICS:
            value = metric.compute(self)
            if value is not None:
                detail = f" ({metric.detail(self)})" if metric.detail else ""
                yield f"{metric.title:<8} {value:{metric.format}}{detail}"

    def worst_confusions(self, most: int) -> list[tuple[str, str, int]]:
        """Returns (true class, predicted class, images) of the most frequent mistakes."""
        wrong = self.confusion
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        places = [divmod(int(at), len(self.class_names)) for at in order]
        return [
            (self.class_names[row], self.class_names[column], int(wrong[row, column]))
            for row, column in places
            if wrong[row, column]
        ]

    def per_class(self) -> list[dict[str, Any]]:
        """Returns for each class: its name, images, correct, recall, precision (None if 0 / 0)."""
        counts = self.confusion
        rows = []
        for index, name in enumerate(self.class_names):
            images, predicted = counts[index].sum(), counts[:, index].sum()
            correct = counts[index, index]
            rows.append(
                {
                    "class": name,
                    "images": int(images),
                    "correct": int(correct),
                    "recall": float(correct / images) if images else None,
                    "precision": float(correct / predicted) if predicted else None,
                }
            )
        return rows

    def warnings(self) -> list[str]:
        """Returns what the metrics hide, a line each."""
        predicted, present = self.confusion.sum(axis=0), self.confusion.sum(axis=1)
        never = [self.class_names[at] for at in np.flatnonzero((predicted == 0) & (present > 0))]
        more = f" and {len(never) - 8:,} more" if len(never) > 8 else ""
        lines = [f"never predicted: {', '.join(never[:8])}{more}"] if never else []
        return [*self.notes, *lines]

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the single predictions as JSON values."""
        values: dict[str, Any] = {
            "data": self.data,
            "images": len(self.labels),
            "images_in_data": len(self.labels) + len(self.bad),
            "bad_images": [{"image": image.name, "error": image.what} for image in self.bad],
            "are_held_out": self.are_held_out,
            "trained_on": self.trained_on,
            "warnings": self.warnings(),
            **dict(self.figures()),
            "reliability": self.reliability.to_json(),
        }
        if self.precision is not None:
            values["precision"] = self.precision
        if self.preprocessing is not None:
            known = self.preprocessing.to_json()
            names = ("resize", "crop", "image_size", "interpolation", "exif_orientation")
            known = {name: known[name] for name in (*names, "crop_small") if name in known}
            values["protocol"] = known
        if self.real is not None:
            values["real"] = self.real.to_json()
        values["per_class"] = self.per_class()
        return {**values, "class_names": self.class_names, "confusion": self.confusion.tolist()}

    def save(
        self, folder: Path, model: ImageClassifier | None = None, *, overwrite: bool = False
    ) -> None:
        """Writes evaluation.json, per_class.csv and confusion.csv (rows: true) to the folder.

        Args:
            folder: made if it is missing; the files are written all or none.
            model: that was evaluated, to be described in evaluation.json.
            overwrite: replace existing files.

        Raises:
            UserError: one of them exists, or the folder cannot be written to.
        """
        check_output_folder(folder, FILES, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.per_class()
        per_class = [list(rows[0]), *(list(row.values()) for row in rows)]
        counts = zip(self.class_names, self.confusion.tolist(), strict=True)
        confusion = [["true class", *self.class_names], *([name, *row] for name, row in counts)]
        text = json.dumps(measurement("evaluation", model, self.to_json()), indent=2) + "\n"
        contents = (_csv(per_class), _csv(confusion), text.encode())
        paths = (folder / name for name in FILES)
        atomic_write_all(dict(zip(paths, contents, strict=True)))


def _csv(rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation, and how it is printed."""

    name: str  # in files
    title: str  # on the screen
    compute: Callable[[Evaluation], float | None]  # None where it does not apply
    format: str = ".2%"
    detail: Callable[[Evaluation], str] | None = None  # in parentheses behind the number
    logged: bool = False  # by a run while it trains


def _real(evaluation: Evaluation) -> str:
    real = evaluation.real
    assert real is not None
    return (
        f"{real.correct:,} of {real.images:,} scored images correct; {real.unlabelled:,} without a "
        "ReaL label are not scored"
    )


METRICS = (
    Metric(
        "top1",
        "top-1",
        lambda e: e.top1,
        detail=lambda e: f"{e.correct.sum():,} correct",
        logged=True,
    ),
    Metric("top5", "top-5", lambda e: e.top5, logged=True),
    Metric(
        "loss",
        "loss",
        lambda e: e.loss,
        ".4f",
        lambda e: "negative log-likelihood, nats",
        logged=True,
    ),
    Metric(
        "expected_calibration_error",
        "ECE",
        lambda e: e.reliability.error,
        detail=lambda e: f"expected calibration error, {BINS} bins",
    ),
    Metric("real", "ReaL", lambda e: e.real.accuracy if e.real else None, detail=_real),
)


@dataclass(frozen=True)
class Reliability:
    """Images by the confidence of their predictions, in B bins of equal width.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3, with 15 bins.
    """

    edges: np.ndarray  # (B + 1,) from 0 to 1; an edge belongs to the bin below it
    images: np.ndarray  # int64 (B,)
    confidence: np.ndarray  # float64 (B,), the sum over the images
    correct: np.ndarray  # int64 (B,), images that were classified correctly

    @property
    def error(self) -> float:
        """The expected calibration error: mean over all images of their bins' |accuracy -
        confidence|, from 0 to 1."""
        return float(np.abs(self.correct - self.confidence).sum() / self.images.sum())

    def to_json(self) -> list[dict[str, Any]]:
        """Returns a row for each bin; mean confidence and accuracy are None where it is empty."""
        rows = []
        for at, images in enumerate(self.images.tolist()):
            mean = self.confidence[at] / images if images else None
            accuracy = self.correct[at] / images if images else None
            rows.append(
                {
                    "above": float(self.edges[at]),
                    "up_to": float(self.edges[at + 1]),
                    "images": images,
                    "confidence": None if mean is None else float(mean),
                    "accuracy": None if accuracy is None else float(accuracy),
                }
            )
        return rows


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """Returns the images in bins of equal width by confidence.

    Args:
        confidence: float (N,), the probability of each prediction, on [0, 1].
        correct: bool (N,), whether it was correct.
        bins: number of bins.
    """
    # An edge is rounded as the confidences are: the float32 next to 1/5 lies on the edge at 1/5.
    edges = (np.arange(bins + 1) / bins).astype(confidence.dtype)
    at = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    return Reliability(
        edges,
        np.bincount(at, minlength=bins),
        np.bincount(at, weights=confidence, minlength=bins),
        np.bincount(at[correct], minlength=bins),
    )
