"""A model and images -> exact counts: top-1, top-5, loss, per class, the confusion matrix.

Every image counts once; the last batch is never dropped. An image that cannot be decoded is left
out of every count and named in `bad`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlp_mixer.data.batches import Batch
from mlp_mixer.data.classes import match_classes
from mlp_mixer.data.items import BadImage, Source
from mlp_mixer.data.loader import TIMEOUT, evaluation_batches
from mlp_mixer.data.sources import open_source
from mlp_mixer.data.transforms import normalize
from mlp_mixer.errors import UserError
from mlp_mixer.models.device import choose_device
from mlp_mixer.models.layers import ImageClassifier, classes_of, preprocessing_of
from mlp_mixer.preprocessing import Preprocessing


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
    """

    data: str
    class_names: list[str]
    labels: np.ndarray
    indices: np.ndarray
    probabilities: np.ndarray
    bad: list[BadImage] = field(default_factory=list)

    @property
    def predictions(self) -> np.ndarray:
        """int64 (N,): the most probable class of each image."""
        return self.probabilities.argmax(axis=1)

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
        five = np.argpartition(self.probabilities, -5, axis=1)[:, -5:]
        return float((five == self.labels[:, None]).any(axis=1).mean())

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the true classes, in nats."""
        tiny = np.finfo(np.float32).tiny
        return float(-np.log(np.maximum(self.truth_probabilities, tiny)).mean())

    @property
    def confusion(self) -> np.ndarray:
        """int64 (K, K): images of the class of the row that were given the class of the column."""
        classes = len(self.class_names)
        flat = np.bincount(self.labels * classes + self.predictions, minlength=classes**2)
        return flat.reshape(classes, classes)

    def metrics(self) -> Iterator[tuple[str, float]]:
        """Yields (name, value) of each figure."""
        yield "top1", self.top1
        if self.top5 is not None:
            yield "top5", self.top5
        yield "loss", self.loss

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

    def to_json(self) -> dict[str, Any]:
        """Returns every figure as JSON values."""
        return {
            "data": self.data,
            "images": len(self.labels),
            "bad_images": [{"image": each.name, "error": each.what} for each in self.bad],
            **dict(self.metrics()),
            "per_class": self.per_class(),
            "class_names": self.class_names,
            "confusion": self.confusion.tolist(),
        }

    def save(self, folder: Path) -> None:
        """Writes evaluation.json, per_class.csv and confusion.csv (rows: true) to the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(self.to_json(), indent=2) + "\n")
        with (folder / "per_class.csv").open(
            "w", newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:
            rows = self.per_class()
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        with (folder / "confusion.csv").open(
            "w", newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:
            table = csv.writer(file)
            table.writerow(["true class", *self.class_names])
            for name, row in zip(self.class_names, self.confusion.tolist(), strict=True):
                table.writerow([name, *row])


def evaluate(
    model: ImageClassifier,
    data: Source | str | Path,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    allow_missing_classes: bool = False,
    device: str | None = None,
    timeout: float = TIMEOUT,
    on_batch: Callable[[Batch], None] | None = None,
) -> Evaluation:
    """Returns what the model makes of every image of the data.

    Args:
        model: with class names; `load_model` gives one.
        data: a source, or its name: "digits:test", "FOLDER", "FOLDER:validation".
        batch_size: images a batch.
        num_workers: processes that decode; None chooses.
        allow_missing_classes: go on where the data lacks some of the model's classes.
        device: "auto" (the GPU where there is one), "cpu", "cuda"; None: where it is.
        timeout: seconds to wait for images of the workers; 0 waits for ever.
        on_batch: called with every batch once it is done, for a progress bar.

    Raises:
        UserError: no such data, or its classes are not the model's.
    """
    if not isinstance(model, ImageClassifier):
        raise UserError(
            f"evaluate takes a model, got {model!r}", fix="mm.load_model(...) gives one"
        )
    source = open_source(str(data)) if isinstance(data, str | Path) else data
    names, preprocessing = classes_of(model), preprocessing_of(model)
    source = match_classes(source, names, owner="the model", allow_missing=allow_missing_classes)
    if device is not None:
        model = model.to(choose_device(device))
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    bad: list[BadImage] = []
    batches = evaluation_batches(
        source, preprocessing, batch_size=batch_size, num_workers=num_workers, timeout=timeout
    )
    for batch in batches:
        bad += batch.bad
        if len(batch.labels):
            probabilities = predict_batch(model, batch, preprocessing)
            parts.append((batch.labels.numpy(), batch.indices.numpy(), probabilities))
        if on_batch is not None:
            on_batch(batch)
    if not parts:
        raise UserError("none of the images can be decoded", where=source.name)
    labels, indices, probabilities = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Evaluation(source.name, names, labels, indices, probabilities, bad)


@torch.inference_mode()
def predict_batch(model: ImageClassifier, batch: Batch, preprocessing: Preprocessing) -> np.ndarray:
    """Returns the class probabilities (N, K), float32, of a batch. The model's mode is kept."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    images = normalize(batch.images.to(device), preprocessing)
    probabilities = model(images).float().softmax(dim=1).cpu().numpy()
    model.train(was_training)
    return probabilities
