"""A model and a source of images -> rows, a batch at a time; nothing is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from allmlp.data.batches import Batch, on_device
from allmlp.data.loader import evaluation_batches
from allmlp.data.source import Source
from allmlp.deploy.answers import Question, answer, make_ready
from allmlp.models.inference import Inference
from allmlp.models.layers import ImageClassifier, classes_of, preprocessing_of

NOT_FINITE = "the model's numbers for this image are not finite"


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        path: of the image.
        classes: (class name, probability), the most probable first; empty for a bad image.
        error: why there is no answer for the image; None for a good one.
        features: float32 (C,), where they were asked for.
    """

    path: str
    classes: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None
    features: np.ndarray | None = field(default=None, compare=False)


Rows = list[Prediction]
OnRows = Callable[[Rows], None]


def predict_rows(
    model: ImageClassifier,
    source: Source,
    question: Question,
    *,
    batch_size: int,
    num_workers: int | None = None,
    ready: Inference | None = None,
) -> Generator[Rows, None, None]:
    """Yields a row for every image, in order, `batch_size` rows at a time.

    On a GPU the next batch is copied and computed while the rows of this one are made.

    Args:
        model: on its device.
        source: the images.
        question: what is asked about each.
        batch_size: images a batch; the last may have fewer.
        num_workers: processes that decode; None chooses.
        ready: the model as `make_ready` made it; None makes it so.

    Raises:
        UserError: a worker died or hung, or a number is out of range.
    """
    batches: Iterable[Batch] = evaluation_batches(
        source, preprocessing_of(model), batch_size=batch_size, num_workers=num_workers
    )
    ready = ready or make_ready(model, question)
    device = ready.device
    if device.type == "cuda":
        batches = on_device((_pinned(batch) for batch in batches), device)
    names = None if question.features else classes_of(model, or_numbers=True)
    waiting: tuple[Batch, tuple[Tensor, Tensor, Tensor] | None] | None = None
    for batch in batches:
        found = answer(ready, batch.images, question) if len(batch.labels) else None
        if device.type == "cpu":  # nothing is gained by waiting
            yield _rows(source, names, batch, found)
            continue
        if waiting is not None:
            yield _rows(source, names, *waiting)
        waiting = batch, found
    if waiting is not None:
        yield _rows(source, names, *waiting)


def _pinned(batch: Batch) -> Batch:
    return replace(batch, images=batch.images.pin_memory()) if len(batch.labels) else batch


def _rows(
    source: Source,
    names: list[str] | None,
    batch: Batch,
    found: tuple[Tensor, Tensor, Tensor] | None,
) -> Rows:
    """The rows of a batch, in the order of its images."""
    rows = {each.index: Prediction(each.name, error=each.what) for each in batch.bad}
    if found is not None:
        values, classes, finite = (each.cpu().numpy() for each in found)
        for at, index in enumerate(batch.indices.tolist()):
            path = source.item_name(index)
            if not finite[at]:
                rows[index] = Prediction(path, error=NOT_FINITE)
            elif names is None:
                rows[index] = Prediction(path, features=values[at])
            else:
                pairs = zip(classes[at].tolist(), values[at].tolist(), strict=True)
                rows[index] = Prediction(path, [(names[k], share) for k, share in pairs])
    return [rows[index] for index in sorted(rows)]


def watched(
    batches: Generator[Rows, None, None], on_rows: OnRows | None
) -> Generator[Rows, None, None]:
    """Yields the same batches, and calls a function with each."""
    with contextlib.closing(batches):  # their workers end with whoever takes them
        for rows in batches:
            if on_rows is not None:
                on_rows(rows)
            yield rows
