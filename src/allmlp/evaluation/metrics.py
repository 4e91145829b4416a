"""Evaluation metrics: accuracy, F1, loss, calibration, per-class results, confusion matrix.

A new metric is a property of `Evaluation` and an entry in `METRICS`, which is printed and written.

Shapes: N images, K classes, B bins.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from allmlp.data.classes import match_classes
from allmlp.data.source import BadImage, Source, as_multi_label, check_one_label
from allmlp.decision import Decision
from allmlp.errors import UserError, named_memory_errors, one_of, plural, some_of
from allmlp.evaluation.imagenet_real import RealScore
from allmlp.evaluation.predictor import Outputs, Predictor, check_finite
from allmlp.evaluation.result_file import measurement
from allmlp.io import Content, atomic_write_all, check_output_folder, csv_text
from allmlp.models.layers import Classifier, classes_of
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.world import World

FILES = ("per_class.csv", "confusion.csv", "evaluation.json")  # written by `Evaluation.save`
BINS = 15
FEW = 1000  # images below which the interval of top-1 is printed
LARGEST_LOGITS = 2**29  # bytes of all images' logits, up to which they are kept
_PROTOCOL = ("resize", "crop", "image_size", "interpolation", "exif_orientation", "crop_small")
MOST_CONFUSED = 4096  # classes up to which the confusion matrix is written


def _per_image(compute: Callable[[Evaluation], np.ndarray]) -> Any:
    """A property with a value per image, which is read from `rows` if the logits were not kept."""
    name = compute.__name__

    def get(self: Evaluation) -> np.ndarray:
        return compute(self) if self.rows is None else self.rows[name]

    return property(get, doc=compute.__doc__)


@dataclass(frozen=True)
class Metric:
    """A property of `Evaluation` that is a single number, or None if it does not apply."""

    name: str  # of the property, and in files
    title: str  # on screen
    detail: str = ""  # in parentheses after the number; a format of the evaluation `e`
    labels: str = ""  # "single" or "multi", if only for one or for several labels per image
    format: str = ".2%"
    in_summary: bool = False  # also where only one line, or one column, is shown
    is_better: Literal["higher", "lower"] = "higher"

    def value(self, evaluation: Evaluation) -> float | None:
        """Returns the metric; None if it does not apply."""
        if self.labels not in ("", "multi" if evaluation.is_multi_label else "single"):
            return None
        value = getattr(evaluation, self.name)
        return value.accuracy if isinstance(value, RealScore) else value

    def text(self, value: float) -> str:
        return f"{self.title} {value:{self.format}}"

    def score(self, value: float) -> float:
        """Returns a number that is higher for better values."""
        return value if self.is_better == "higher" else -value


_TOP1, _MAP, _ECE = "top1", "mean_average_precision", "expected_calibration_error"
_REAL = "{e.real.correct:,} of {e.real.images:,} scored images correct; {e.real.unlabelled:,} "
_REAL += "without a ReaL label are not scored"
_RECALL, _RAW = "accuracy, mean recall of the classes", "without the model's temperature"
_UNSURE = "the others are unsure: below {e.decision.unsure_below:.4g}"
METRICS = (
    Metric(_TOP1, "top-1", "{e.num_correct:,} correct{e.chance}", "single", in_summary=True),
    Metric(_MAP, "mAP", "mean average precision of the classes", "multi", in_summary=True),
    Metric("balanced_accuracy", "balanced", _RECALL, "single", in_summary=True),
    Metric("micro_f1", "micro F1", "of all labels", "multi", in_summary=True),
    Metric("macro_f1", "macro F1", "mean F1 of the classes", in_summary=True),
    Metric("exact_match", "exact", "{e.num_correct:,} images with all labels right", "multi"),
    Metric("top5", "top-5"),
    Metric("loss", "loss", "negative log-likelihood, nats", format=".4f", is_better="lower"),
    Metric(_ECE, "ECE", f"expected calibration error, {BINS} bins", is_better="lower"),
    Metric("uncalibrated_error", "raw ECE", _RAW, is_better="lower"),
    Metric("coverage", "answered", _UNSURE),
    Metric("accuracy_answered", "accuracy", "of the answers"),
    Metric("real", "ReaL", _REAL),
)
_NAMED = {metric.name: metric for metric in METRICS}
_MAIN = tuple(_NAMED[name] for name in (_TOP1, _MAP, "micro_f1"))


def main_of(names: Container[str]) -> Metric:
    """Returns top-1, or for several labels per image the mean average precision, or micro F1 if no
    image has a label."""
    return next(metric for metric in _MAIN if metric.name in names)


def metric_of(name: str, example: Evaluation | None = None) -> Metric:
    """Returns a metric by name; UserError if it does not apply to such evaluations."""
    found = _NAMED[one_of("metric", name, _NAMED, where="best_by")]
    if example is not None and found.value(example) is None:
        fix = f"One of {', '.join(dict(example.figures()))}"
        what = f"the metric {name} does not apply to this data"
        raise UserError(what, where="best_by", fix=fix, code="not-applicable")
    return found


@dataclass(frozen=True)
class Reliability:
    """Images by the confidence of their predictions, in B bins of equal width (Guo et al. 2017,
    "On Calibration of Modern Neural Networks", equation 3)."""

    edges: np.ndarray  # (B + 1,) from 0 to 1; an edge belongs to the bin below
    images: np.ndarray  # int64 (B,)
    confidence: np.ndarray  # float64 (B,), the sum over the images
    correct: np.ndarray  # int64 (B,), correctly classified images

    @property
    def error(self) -> float:
        """The expected calibration error: |accuracy - confidence| of the bins, averaged over all
        images, from 0 to 1."""
        return float(np.abs(self.correct - self.confidence).sum() / self.images.sum())

    def to_json(self) -> list[dict[str, Any]]:
        """Returns a row per bin; mean confidence and accuracy are None for empty bins."""
        edges, images = self.edges.tolist(), self.images.tolist()
        means = [list(map(_ratio, sums, images)) for sums in (self.confidence, self.correct)]
        names = ("above", "up_to", "images", "confidence", "accuracy")
        rows = zip(edges[:-1], edges[1:], images, *means, strict=True)
        return [dict(zip(names, row, strict=True)) for row in rows]


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """Bins images by confidence, float (N,) on [0, 1]; correct is bool (N,)."""
    # Round the edges like the confidences: the float32 closest to 1/5 lies on the edge at 1/5.
    edges = (np.arange(bins + 1) / bins).astype(confidence.dtype)
    at = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    sums = np.bincount(at, weights=confidence, minlength=bins)
    images, right = (np.bincount(rows, minlength=bins) for rows in (at, at[correct]))
    return Reliability(edges, images, sums, right)


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float | None:
    """Returns the average precision of one class, bool (N,) and float (N,), as scikit-learn's: the
    precision at each score times the recall gained there. None without a positive."""
    positives, true, predicted, _ = _counts(truth, scores)
    if not positives:
        return None
    gained = np.diff(true, prepend=0) / positives
    return float((gained * (true / predicted)).sum())


def best_thresholds(truth: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Returns the logits from which a class is predicted so that its F1 is highest, float64 (K,):
    in the middle between two scores, as near to 0 as possible; 0 for a class without a positive."""
    found = np.zeros(truth.shape[1])
    for number in range(truth.shape[1]):
        positives, true, predicted, scores = _counts(truth[:, number], logits[:, number])
        if not positives:
            continue
        f1 = 2 * true / (positives + predicted)
        lower = np.append(scores[1:], scores[-1] - 2.0)  # the last predicts the class for all
        middle = np.where((lower < 0) & (scores >= 0), 0.0, (scores + lower) / 2)
        best = np.flatnonzero(f1 == f1.max())
        found[number] = middle[best[np.abs(middle[best]).argmin()]]
    return found


def _counts(
    truth: np.ndarray, scores: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the number of positives, and for each distinct score, highest first, the positives
    and the images from it on, and the score in float64."""
    order = np.argsort(-scores, kind="stable")
    ordered, sums = scores[order].astype(np.float64), np.cumsum(truth[order])
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    return int(sums[-1]), sums[ends], ends + 1, ordered[ends]


@dataclass(repr=False)
class Evaluation:
    """A model's predictions for labelled images; K classes, N decodable images.

    Attributes:
        data: the name of the source.
        class_names: the model's classes, K.
        labels: int64 (N,), the true classes; with several labels per image bool (N, K).
        indices: int64 (N,), positions of the images in the source.
        logits: float32 (N, K), used for ranking and for the loss: probabilities too small for
            float32 are all 0.
        bad: images that could not be decoded.
        preprocessing: from image files to inputs; None if unknown.
        real: the ImageNet ReaL score; None if not requested.
        are_held_out: whether the images are those that the model's run held out.
        trained_on: how many of the images the model's run was trained on; None if unknown.
        precision: of the matmuls, and why; None if unknown.
        notes: other remarks on the metrics, one per line.
        decision: the model's, from logits to probabilities.
        described: the model and the environment as JSON values; {} if unknown.
        rows: if the logits would take more than `LARGEST_LOGITS` (with one label per image): what
            the metrics need of each image. `logits` is (N, 0) then, and no temperature is fitted.
    """

    data: str
    class_names: list[str]
    labels: np.ndarray
    indices: np.ndarray
    logits: np.ndarray
    bad: list[BadImage] = field(default_factory=list)
    preprocessing: Preprocessing | None = None
    real: RealScore | None = None
    are_held_out: bool = False
    trained_on: int | None = None
    precision: str | None = None
    notes: list[str] = field(default_factory=list)
    decision: Decision = field(default_factory=Decision)
    described: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, np.ndarray] | None = None

    @cached_property
    def probabilities(self) -> np.ndarray:
        """float32 (N, K): with the temperature of the decision."""
        return self.decision.probabilities(torch.from_numpy(self.logits)).numpy()

    @property
    def is_multi_label(self) -> bool:
        """Whether images have several labels, or none."""
        return self.labels.ndim == 2

    def _answers(self, rows: slice = slice(None)) -> np.ndarray:
        """bool (N, K): the classes that are answers."""
        return self.decision.answers(torch.from_numpy(self.probabilities[rows])).numpy()

    @_per_image
    def predictions(self) -> np.ndarray:
        """int64 (N,): the most probable class of each image; ties go to the first. With several
        labels an image bool (N, K): the classes that reach their thresholds."""
        return self._answers() if self.is_multi_label else self.logits.argmax(axis=1)

    @_per_image
    def confidences(self) -> np.ndarray:
        """float32 (N,): the probability of each image's predicted class."""
        return self.probabilities[np.arange(len(self.labels)), self.predictions]

    @property
    def correct(self) -> np.ndarray:
        """bool (N,): whether the most probable class is the true one, or all labels are right."""
        right = self.predictions == self.labels
        return right.all(axis=1) if self.is_multi_label else right

    @property
    def num_correct(self) -> int:
        return int(self.correct.sum())

    @property
    def top1(self) -> float:
        """Fraction of images that are correct."""
        return float(self.correct.mean())

    exact_match = top1

    @property
    def top1_interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of top-1, which is Wilson's (1927)."""
        count, z = len(self.labels), NormalDist().inv_cdf(0.975)
        middle = (self.top1 + z**2 / (2 * count)) / (1 + z**2 / count)
        spread = self.top1 * (1 - self.top1) / count + (z / (2 * count)) ** 2
        half = z * math.sqrt(spread) / (1 + z**2 / count)
        return max(middle - half, 0.0), min(middle + half, 1.0)

    @property
    def chance(self) -> str:
        """ "; 95% interval 94.3% to 98.7%" of top-1 if the images are few, else ""."""
        low, high = self.top1_interval
        is_shown = len(self.labels) < FEW and not self.is_multi_label
        return f"; 95% interval {low:.1%} to {high:.1%}" if is_shown else ""

    @_per_image
    def in_top5(self) -> np.ndarray:
        """bool (N,): whether the true class is among the 5 most probable."""
        scores, truth = self.logits, self.labels[:, None]
        own = np.take_along_axis(scores, truth, axis=1)
        is_before = ~(scores <= own) | ((scores == own) & (np.arange(scores.shape[1]) < truth))
        return is_before.sum(axis=1) < 5

    @property
    def top5(self) -> float | None:
        """Fraction of images in `in_top5`; None if K <= 5, or with several labels per image."""
        if len(self.class_names) <= 5 or self.is_multi_label:
            return None
        return float(self.in_top5.mean())

    @_per_image
    def sums(self) -> np.ndarray:
        """float64 (N,): the sum of the logits, which is finite if all are."""
        return torch.from_numpy(self.logits).sum(dim=1, dtype=torch.float64).numpy()

    def without_logits(self) -> Evaluation:
        """Returns the same metrics, but for those that compare temperatures, in little memory."""
        names = ("predictions", "confidences", "losses", "in_top5", "sums")
        rows = {name: getattr(self, name) for name in names}
        return replace(self, logits=self.logits[:, :0].copy(), rows=rows)

    @property
    def class_counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 (K,) each: the images of a class, its predictions, and the correct ones."""
        truth, predicted = self.labels, self.predictions
        if self.is_multi_label:
            return truth.sum(axis=0), predicted.sum(axis=0), (truth & predicted).sum(axis=0)
        rows, classes = (truth, predicted, truth[truth == predicted]), len(self.class_names)
        images, guesses, correct = (np.bincount(row, minlength=classes) for row in rows)
        return images, guesses, correct

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have images, as in scikit-learn."""
        images, _, correct = self.class_counts
        return float((correct[images > 0] / images[images > 0]).mean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that have images or predictions, as in scikit-learn; 0 if none."""
        images, predicted, correct = self.class_counts
        is_used = images + predicted > 0
        scores = 2 * correct[is_used] / (images + predicted)[is_used]
        return float(scores.mean()) if len(scores) else 0.0

    @property
    def micro_f1(self) -> float:
        """F1 over all labels of all images at once, as in scikit-learn; 0 if there are none."""
        images, predicted, correct = self.class_counts
        return float(2 * correct.sum() / max(1, (images + predicted).sum()))

    @cached_property
    def average_precisions(self) -> list[float | None]:
        """The average precision of each class, as in scikit-learn; None without a positive."""
        return [average_precision(*both) for both in zip(self.labels.T, self.logits.T, strict=True)]

    @property
    def mean_average_precision(self) -> float | None:
        """The mean over the classes that have images."""
        known = [value for value in self.average_precisions if value is not None]
        return sum(known) / len(known) if known else None

    @_per_image
    def losses(self) -> np.ndarray:
        """float64 (N,): the negative log-likelihood of each image's true class, in nats; with
        several labels per image the sum over the classes."""
        found = np.empty(len(self.labels))
        for at in range(0, len(found), 1024):  # float64 copies of a few rows at a time
            rows = torch.from_numpy(self.logits[at : at + 1024]).double()
            truth = torch.from_numpy(self.labels[at : at + 1024])
            if self.is_multi_label:
                rows = torch.where(truth, rows, -rows)
                found[at : at + 1024] = -F.logsigmoid(rows).sum(dim=1).numpy()
            else:
                likely = rows.log_softmax(dim=1).gather(1, truth[:, None])
                found[at : at + 1024] = -likely[:, 0].numpy()
        return found

    @property
    def loss(self) -> float:
        """Mean of `losses`."""
        return float(self.losses.mean())

    @property
    def reliability(self) -> Reliability:
        """The images by confidence; with several labels per image, every class of every image by
        its probability."""
        if self.is_multi_label:
            return reliability(self.probabilities.ravel(), self.labels.ravel())
        return reliability(self.confidences, self.correct)

    @property
    def expected_calibration_error(self) -> float:
        return self.reliability.error

    @property
    def uncalibrated_error(self) -> float | None:
        """The same without the model's temperature; None if it has none."""
        if self.decision.temperature == 1.0 or self.rows is not None:
            return None
        raw = replace(self, decision=replace(self.decision, temperature=1.0))
        return raw.expected_calibration_error

    def answered(self, threshold: Any) -> dict[str, Any]:
        """Returns coverage, and accuracy of the answers (None without any), at a threshold."""
        has_answer = self.confidences >= threshold
        accuracy = float(self.correct[has_answer].mean()) if has_answer.any() else None
        return {"threshold": threshold, "coverage": float(has_answer.mean()), "accuracy": accuracy}

    @property
    def coverage(self) -> float | None:
        """Fraction of images with an answer; None if the model has no threshold for "unsure"."""
        limit = self.decision.unsure_below
        return None if limit is None else self.answered(limit)["coverage"]

    @property
    def accuracy_answered(self) -> float | None:
        """Fraction of correct answers; None without answers or a threshold."""
        limit = self.decision.unsure_below
        return None if limit is None else self.answered(limit)["accuracy"]

    @property
    def confusion(self) -> np.ndarray:
        """int64 (K, K): number of images of the row's class predicted as the column's class."""
        classes = len(self.class_names)
        flat = np.bincount(self.labels * classes + self.predictions, minlength=classes**2)
        return flat.reshape(classes, classes)

    def __repr__(self) -> str:
        classes = plural(len(self.class_names), "class")
        images = plural(len(self.labels), "image")
        main = self.main.text(self.main_metric)
        return f"Evaluation({self.data!r}: {images}, {classes}, {main})"

    def figures(self, metrics: Iterable[Metric] = METRICS) -> Iterator[tuple[str, float]]:
        """Yields (name, value) of all metrics that are a single number, or of these."""
        for metric in metrics:
            value = metric.value(self)
            if value is not None:
                yield metric.name, value

    @property
    def main(self) -> Metric:
        return main_of(dict(self.figures(_MAIN)))

    @property
    def main_metric(self) -> float:
        return getattr(self, self.main.name)

    def summary(self) -> str:
        """Returns the metrics of one line, "97.22%, balanced 97.18%, macro F1 97.20%"."""
        shown = self.figures(metric for metric in METRICS if metric.in_summary)
        return ", ".join(_NAMED[name].text(value) for name, value in shown).removeprefix("top-1 ")

    def lines(self) -> Iterator[str]:
        for name, value in self.figures():
            metric = _NAMED[name]
            detail = f" ({metric.detail.format(e=self)})" if metric.detail else ""
            yield f"{metric.title:<8} {value:{metric.format}}{detail}"

    def worst_confusions(self, most: int) -> list[tuple[str, str, int]]:
        """Returns (true class, predicted class, images) of the most frequent errors."""
        if self.is_multi_label:
            return []
        wrong, names = ~self.correct, self.class_names
        true, predicted = self.labels[wrong].tolist(), self.predictions[wrong].tolist()
        pairs = Counter(zip(true, predicted, strict=True)).items()
        first = sorted(pairs, key=lambda item: (-item[1], item[0]))[:most]
        return [(names[row], names[column], count) for (row, column), count in first]

    def predicted(self, row: int) -> list[tuple[str, float]]:
        """Returns the predicted class of an image, or all of them, with their probabilities."""
        if not self.is_multi_label:
            return [(self.class_names[self.predictions[row]], float(self.confidences[row]))]
        places = np.flatnonzero(self._answers(slice(row, row + 1))).tolist()
        return [(self.class_names[at], float(self.probabilities[row, at])) for at in places]

    def mistakes(self) -> np.ndarray:
        """Returns the positions of misclassified images; the least probable truth first."""
        order = np.argsort(-self.losses, kind="stable")
        return order[~self.correct[order]]

    def per_class(self) -> list[dict[str, Any]]:
        """Returns per class: name, images, correct, recall, precision and F1 (None if 0 / 0); with
        several labels per image also its average precision and its threshold."""
        counts = (column.tolist() for column in self.class_counts)
        rows: list[dict[str, Any]] = [
            {
                "class": name,
                "images": images,
                "correct": correct,
                "recall": _ratio(correct, images),
                "precision": _ratio(correct, predicted),
                "f1": _ratio(2 * correct, images + predicted),
            }
            for name, images, predicted, correct in zip(self.class_names, *counts, strict=True)
        ]
        if self.is_multi_label:
            limits = self.decision.thresholds or (0.5,) * len(rows)
            for row, found, limit in zip(rows, self.average_precisions, limits, strict=True):
                row |= {"average_precision": found, "threshold": limit}
        return rows

    def warnings(self) -> list[str]:
        """Returns caveats that the metrics do not show, one per line."""
        images, predicted, _ = self.class_counts
        never = [self.class_names[at] for at in np.flatnonzero((predicted == 0) & (images > 0))]
        lines = [f"never predicted: {some_of(never)}"] if never else []
        if self.rows is not None:
            size = 4 * len(self.labels) * len(self.class_names) / 1e9
            lines.append(f"the logits, {size:.1f} GB, were not kept: no temperature can be fitted")
        return [*self.notes, *lines]

    @property
    def has_confusion(self) -> bool:
        """Whether the confusion matrix applies and is small enough to be written and drawn."""
        return not self.is_multi_label and len(self.class_names) <= MOST_CONFUSED

    def to_json(self) -> dict[str, Any]:
        """Returns everything except individual predictions as JSON values."""
        values: dict[str, Any] = {
            **self.described,
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
        if self.decision != Decision():
            values["decision"] = self.decision.to_json()
        if self.preprocessing is not None:
            known = self.preprocessing.to_json()
            values["protocol"] = {name: known[name] for name in _PROTOCOL if name in known}
        if self.real is not None:
            values["real"] = self.real.to_json()
        values |= {"per_class": self.per_class(), "class_names": self.class_names}
        if not self.is_multi_label:
            values["top1_interval"] = list(self.top1_interval)
        if self.has_confusion:
            values["confusion"] = self.confusion.tolist()
        return values

    def save(
        self, folder: Path, model: Classifier | None = None, *, overwrite: bool = False
    ) -> None:
        """Writes evaluation.json (with a description of the model), per_class.csv and, with one
        label an image and few classes, confusion.csv (rows: true), all or none."""
        check_output_folder(folder, FILES, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.per_class()
        per_class = [list(rows[0]), *(list(row.values()) for row in rows)]
        text = json.dumps(measurement("evaluation", model, self.to_json()), indent=2) + "\n"
        contents: dict[Path, Content] = {folder / "per_class.csv": csv_text(per_class)}
        contents[folder / "evaluation.json"] = text
        if self.has_confusion:
            counts = zip(self.class_names, self.confusion.tolist(), strict=True)
            confusion = [["true class", *self.class_names], *([name, *row] for name, row in counts)]
            contents[folder / "confusion.csv"] = csv_text(confusion)
        atomic_write_all(contents)
        if not self.has_confusion:
            (folder / "confusion.csv").unlink(missing_ok=True)  # of an earlier evaluation


@named_memory_errors()
def evaluate_source(
    predictor: Predictor,
    source: Source,
    *,
    allow_missing_classes: bool = False,
    keep_logits: bool = False,
    world: World | None = None,
    on_batch: Callable[[Outputs], None] | None = None,
) -> Evaluation:
    """Returns a model's predictions for all images, finite or not, on all processes.

    Logits of more than `LARGEST_LOGITS` are dropped unless `keep_logits`.
    """
    names = classes_of(predictor.model)
    if len(names) == 1:
        what = f"the model knows one class only, {names[0]!r}: every prediction would be correct"
        raise UserError(what, fix="Evaluate a model of two classes or more")
    if predictor.model.decision.labels == "multi":
        source = as_multi_label(source)
    else:
        check_one_label((source,), "the model, which predicts one label per image,")
    matched = match_classes(source, names, owner="the model", allow_missing=allow_missing_classes)
    decision = predictor.model.decision
    size = 4 * len(matched) * len(names)
    is_kept = keep_logits or matched.is_multi_label or size <= LARGEST_LOGITS

    def columns_of(labels: np.ndarray, indices: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
        found = Evaluation(source.name, names, labels, indices, logits, decision=decision)
        found = found if is_kept else found.without_logits()
        return {"labels": labels, "indices": indices, "logits": found.logits} | (found.rows or {})

    none = np.empty((0, len(names)), dtype=np.float32)
    own = [columns_of(matched.labels[:0], np.empty(0, dtype=np.int64), none)]
    bad: list[BadImage] = []
    for outputs in predictor.run(matched, world=world):
        bad += outputs.bad
        if outputs.values:
            own.append(columns_of(outputs.labels, outputs.indices, outputs.values[0]))
        if on_batch is not None:
            on_batch(outputs)
    part = {name: np.concatenate([columns[name] for columns in own]) for name in own[0]}
    parts = [(part, bad)] if world is None else world.gather((part, bad))
    columns = {name: np.concatenate([part[name] for part, _ in parts]) for name in part}
    labels, indices, logits = (columns.pop(name) for name in ("labels", "indices", "logits"))
    if not len(labels):
        raise UserError("none of the images can be decoded", where=source.name)
    return Evaluation(
        *(source.name, names, labels, indices, logits),
        bad=[image for _, bad in parts for image in bad],
        preprocessing=predictor.preprocessing,
        precision=f"{predictor.precision} ({predictor.why})",
        decision=decision,
        rows=columns or None,
    )


def check_logits(result: Evaluation, source: Source) -> None:
    """Raises UserError if any logit is NaN or infinite."""
    fix = "The weights are damaged or of a run that has diverged: take earlier ones"
    values = result.logits if result.rows is None else result.sums[:, None]
    check_finite(values, result.indices, source, "logits", fix)
