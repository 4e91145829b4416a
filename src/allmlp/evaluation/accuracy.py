"""A model and images -> logits and their figures (`Evaluation`).

Every image counts once; the last batch is never dropped. An image that cannot be decoded is left
out of every count and named in `bad`. Several processes may each take a part (`evaluate_part`) and
put their parts together (`join_parts`): the batches, and so the numbers, are those of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from allmlp.data.batches import Batch
from allmlp.data.classes import match_classes
from allmlp.data.items import BadImage, Source, subset
from allmlp.data.loader import TIMEOUT, evaluation_batches
from allmlp.data.transforms import normalize
from allmlp.errors import UserError, named_memory_errors
from allmlp.evaluation.figures import Evaluation
from allmlp.models.inference import Inference, choose_precision
from allmlp.models.layers import ImageClassifier, classes_of, preprocessing_of
from allmlp.runtime.device import to_device


@dataclass
class Part:
    """What a model made of a part of the images: the fields are those of `Evaluation`."""

    labels: np.ndarray
    indices: np.ndarray
    logits: np.ndarray
    bad: list[BadImage]


@named_memory_errors()
def evaluate_part(
    model: ImageClassifier,
    source: Source,
    *,
    rank: int = 0,
    size: int = 1,
    batch_size: int,
    num_workers: int | None = None,
    allow_missing_classes: bool = False,
    device: str | None = None,
    precision: str | None = None,
    timeout: float = TIMEOUT,
    on_batch: Callable[[Batch], None] | None = None,
) -> Part:
    """Returns what the model makes of a part of the images; it may be empty.

    Whole batches are shared out, so that a model sees the same batches however many parts there
    are, and answers with the same bits.

    Args:
        model: with class names.
        source: all of the images.
        rank, size: this is part `rank`, from 0, of `size`.
        batch_size, num_workers, allow_missing_classes, device, precision, timeout, on_batch: as
            the public `evaluate`.

    Raises:
        UserError: as there; but a part may be empty, and its logits may not be finite.
    """
    if not isinstance(model, ImageClassifier):
        raise UserError(
            f"evaluate takes a model, got {model!r}",
            fix="am.load_model(...) gives one; of an exported file, am.open_exported(FILE)",
        )
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    names, preprocessing = classes_of(model), preprocessing_of(model)
    if len(names) == 1:
        what = f"the model knows one class only, {names[0]!r}: whatever it is shown, it is right"
        raise UserError(what, fix="Measure a model of two classes or more")
    matched = match_classes(source, names, owner="the model", allow_missing=allow_missing_classes)
    model = to_device(model, device)
    ready = Inference(model, choose_precision(model, precision)[0])
    batches = math.ceil(len(source) / batch_size)
    first, stop = (
        min(batches * (rank + more) // size * batch_size, len(source)) for more in (0, 1)
    )
    share = subset(matched, np.arange(first, stop), source.name) if size > 1 else matched
    empty = np.empty(0, dtype=np.int64)
    parts = [(empty, empty, np.empty((0, len(names)), dtype=np.float32))]
    bad: list[BadImage] = []
    for batch in evaluation_batches(
        share, preprocessing, batch_size=batch_size, num_workers=num_workers, timeout=timeout
    ):
        bad += [replace(each, index=each.index + first) for each in batch.bad]
        if len(batch.labels):
            with ready.few_threads(len(batch.labels)):
                images = normalize(batch.images.to(ready.device), preprocessing)
                logits = ready.logits(images).cpu().numpy()
            parts.append((batch.labels.numpy(), batch.indices.numpy() + first, logits))
        if on_batch is not None:
            on_batch(batch)
    labels, indices, logits = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Part(labels, indices, logits, bad)


def join_parts(model: ImageClassifier, source: Source, parts: Sequence[Part]) -> Evaluation:
    """Returns all parts of the images as one evaluation.

    Raises:
        UserError: none of the images can be decoded.
    """
    labels, indices, logits = (
        np.concatenate(each)
        for each in zip(*((part.labels, part.indices, part.logits) for part in parts), strict=True)
    )
    if not len(labels):
        raise UserError("none of the images can be decoded", where=source.name)
    return Evaluation(
        source.name,
        classes_of(model),
        labels,
        indices,
        torch.from_numpy(logits).softmax(dim=1).numpy(),
        [bad for part in parts for bad in part.bad],
        logits,
        preprocessing_of(model),
    )


def refuse_not_finite(result: Evaluation, source: Source) -> None:
    """Refuses figures of logits that are NaN or infinite.

    Raises:
        UserError: names the first image that has such logits.
    """
    wrong = np.flatnonzero(~np.isfinite(result.scores).all(axis=1))
    if len(wrong):
        row = result.scores[wrong[0]]
        value = row[~np.isfinite(row)][0]
        what = f"the logits of {len(wrong):,} of {len(result.labels):,} images are not finite: "
        raise UserError(
            f"{what}{value} for the first of them",
            where=source.item_name(int(result.indices[wrong[0]])),
            fix="The weights are damaged or of a run that has diverged: take earlier ones",
        )
