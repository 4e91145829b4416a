"""The figures of an evaluation: top-1, top-5, loss, calibration, per class, the confusion matrix.

All are exact counts over the images that could be decoded, from the logits as the model gave them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allmlp.data.items import BadImage
from allmlp.evaluation.calibration import Reliability, reliability
from allmlp.evaluation.measurement import measurement
from allmlp.evaluation.real import RealScore
from allmlp.io import atomic_write_all, check_output_folder
from allmlp.models.layers import ImageClassifier
from allmlp.preprocessing import Preprocessing

FILES = ("per_class.csv", "confusion.csv", "evaluation.json")  # what `Evaluation.save` writes


@dataclass
class Evaluation:
    """What a model made of some labelled images; K classes, N images that could be decoded.

    Attributes:
        data: the name of the source.
        class_names: the model's classes, K.
        labels: int64 (N,), the true classes.
        indices: int64 (N,), of the images in the source.
        probabilities: float32 (N, K), the softmax of the logits.
        bad: the images that could not be decoded.
        logits: float32 (N, K), by which classes are ordered and the loss is taken: probabilities
            that are too small for float32 are all 0. None where only `probabilities` are known.
        preprocessing: what made inputs of the images; None where it is unknown.
        real: the ImageNet ReaL score; None where it was not asked for.
        are_held_out: whether the images are those that the model's run held out.
        trained_on: how many of the images the model's run was trained on; None where unknown.
        notes: what else the figures hide, a line each.
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
    notes: list[str] = field(default_factory=list)

    @property
    def scores(self) -> np.ndarray:
        """float32 (N, K): what orders the classes of an image: logits, else probabilities."""
        return self.probabilities if self.logits is None else self.logits

    @property
    def predictions(self) -> np.ndarray:
        """int64 (N,): the most probable class of each image, of equal ones the first."""
        return self.scores.argmax(axis=1)

    @property
    def confidences(self) -> np.ndarray:
        """float32 (N,): the probability of each image's predicted class."""
        return self.probabilities[np.arange(len(self.labels)), self.predictions]

    @property
    def truth_probabilities(self) -> np.ndarray:
        """float32 (N,): what the model gave the true class of each image."""
        return self.probabilities[np.arange(len(self.labels)), self.labels]

    @property
    def top1(self) -> float:
        """Share of the images whose most probable class is the true one."""
        return float((self.predictions == self.labels).mean())

    @property
    def top5(self) -> float | None:
        """Share of the images whose true class is among the 5 most probable; None for K <= 5."""
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
        """The images by how sure the model was; its `error` is the expected calibration error."""
        return reliability(self.confidences, self.predictions == self.labels)

    @property
    def confusion(self) -> np.ndarray:
        """int64 (K, K): images of the class of the row that were given the class of the column."""
        classes = len(self.class_names)
        flat = np.bincount(self.labels * classes + self.predictions, minlength=classes**2)
        return flat.reshape(classes, classes)

    def metrics(self) -> Iterator[tuple[str, float]]:
        """Yields (name, value) of the figures that a run logs as it trains."""
        yield "top1", self.top1
        top5 = self.top5
        if top5 is not None:
            yield "top5", top5
        yield "loss", self.loss

    def figures(self) -> Iterator[tuple[str, float]]:
        """Yields (name, value) of every figure that is one number."""
        yield from self.metrics()
        yield "expected_calibration_error", self.reliability.error
        if self.real is not None:
            yield from self.real.metrics()

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
            images, given, correct = (
                counts[index].sum(),
                counts[:, index].sum(),
                counts[index, index],
            )
            rows.append(
                {
                    "class": name,
                    "images": int(images),
                    "correct": int(correct),
                    "recall": float(correct / images) if images else None,
                    "precision": float(correct / given) if given else None,
                }
            )
        return rows

    def warnings(self) -> list[str]:
        """Returns what the figures hide, a line each."""
        given, had = self.confusion.sum(axis=0), self.confusion.sum(axis=1)
        never = [self.class_names[at] for at in np.flatnonzero((given == 0) & (had > 0))]
        more = f" and {len(never) - 8:,} more" if len(never) > 8 else ""
        lines = [f"never predicted: {', '.join(never[:8])}{more}"] if never else []
        return [*self.notes, *lines]

    def to_json(self) -> dict[str, Any]:
        """Returns every figure as JSON values."""
        values: dict[str, Any] = {
            "data": self.data,
            "images": len(self.labels),
            "images_in_data": len(self.labels) + len(self.bad),
            "bad_images": [{"image": each.name, "error": each.what} for each in self.bad],
            "are_held_out": self.are_held_out,
            "trained_on": self.trained_on,
            "warnings": self.warnings(),
            **dict(self.metrics()),
            "expected_calibration_error": self.reliability.error,
            "reliability": self.reliability.to_json(),
        }
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
            folder: made where it is not there; the files come whole or not at all.
            model: that was measured, to be described in evaluation.json.
            overwrite: replace the files that are there.

        Raises:
            UserError: one of them is there, or the folder cannot be written to.
        """
        check_output_folder(folder, FILES, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        values = measurement("evaluation", model, self.to_json())
        rows = self.per_class()
        text = json.dumps(values, indent=2) + "\n"
        counts = zip(self.class_names, self.confusion.tolist(), strict=True)
        per_class = [list(rows[0]), *(list(row.values()) for row in rows)]
        confusion = [["true class", *self.class_names], *([name, *row] for name, row in counts)]
        atomic_write_all(
            {
                folder / name: content
                for name, content in zip(
                    FILES, (_csv(per_class), _csv(confusion), text.encode()), strict=True
                )
            }
        )


def _csv(rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")
