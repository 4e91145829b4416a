"""A model and labelled images -> `Evaluation`.

Every image counts once; the last batch is never dropped. An image that cannot be decoded is in no
count and named in `bad`. Several processes each take a part: the batches, and so the numbers, are
those of one process.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from allmlp.data.classes import match_classes
from allmlp.data.source import BadImage, Source
from allmlp.errors import UserError, named_memory_errors
from allmlp.evaluation.metrics import Evaluation
from allmlp.evaluation.predictor import Outputs, Predictor, check_finite
from allmlp.models.layers import classes_of
from allmlp.runtime.world import World


@named_memory_errors()
def evaluate_source(
    predictor: Predictor,
    source: Source,
    *,
    allow_missing_classes: bool = False,
    world: World | None = None,
    on_batch: Callable[[Outputs], None] | None = None,
) -> Evaluation:
    """Returns what a model predicts for every image, whether or not its logits are finite.

    Args:
        predictor: of a model with class names, the same on every process.
        source: all of the images.
        allow_missing_classes: accept data without some of the model's classes.
        world: the processes that share the images; all of them get the result.
        on_batch: called with every batch of this process.
    """
    names = classes_of(predictor.model)
    if len(names) == 1:
        what = f"the model knows one class only, {names[0]!r}: every prediction would be correct"
        raise UserError(what, fix="Evaluate a model of two classes or more")
    matched = match_classes(source, names, owner="the model", allow_missing=allow_missing_classes)
    empty = np.empty(0, dtype=np.int64)
    rows = [(empty, empty, np.empty((0, len(names)), dtype=np.float32))]
    bad: list[BadImage] = []
    for outputs in predictor.run(matched, world=world):
        bad += outputs.bad
        if outputs.values:
            rows.append((outputs.labels, outputs.indices, outputs.values[0]))
        if on_batch is not None:
            on_batch(outputs)
    part = tuple(np.concatenate(column) for column in zip(*rows, strict=True))
    parts = [(part, bad)] if world is None else world.gather((part, bad))
    labels, indices, logits = (
        np.concatenate(column) for column in zip(*(part for part, _ in parts), strict=True)
    )
    if not len(labels):
        raise UserError("none of the images can be decoded", where=source.name)
    return Evaluation(
        source.name,
        names,
        labels,
        indices,
        torch.from_numpy(logits).softmax(dim=1).numpy(),
        [image for _, bad in parts for image in bad],
        logits,
        predictor.preprocessing,
        precision=f"{predictor.precision} ({predictor.why})",
    )


def check_logits(result: Evaluation, source: Source) -> None:
    """Raises UserError if logits are NaN or infinite."""
    fix = "The weights are damaged or of a run that has diverged: take earlier ones"
    check_finite(result.scores, result.indices, source, "logits", fix)
