"""Evaluation, also by all processes of a run: each takes a part of the images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from allmlp.data.batches import Batch
from allmlp.data.items import Source
from allmlp.data.loader import TIMEOUT
from allmlp.evaluation.accuracy import (
    Evaluation,
    evaluate_part,
    join_parts,
    refuse_not_finite,
)
from allmlp.models.layers import ImageClassifier
from allmlp.training.own_images import Measured, open_measured

if TYPE_CHECKING:  # what measures alone need not wait for torch's collectives
    from allmlp.runtime.device import ComputePolicy
    from allmlp.runtime.world import World
    from allmlp.training.config import TrainConfig


def evaluate(
    model: ImageClassifier,
    data: Source | str | Path,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    allow_missing_classes: bool = False,
    device: str | None = None,
    precision: str | None = None,
    timeout: float = TIMEOUT,
    on_batch: Callable[[Batch], None] | None = None,
) -> Evaluation:
    """Returns what the model makes of every image of the data.

    Args:
        model: with class names; `load_model` gives one.
        data: a source, or its name: "digits:test", "FOLDER", "FOLDER:validation". Of a name without
            a split it is the test images, else those to validate by, which are the model's own
            where its run held them out of this data, else all.
        batch_size: images a batch.
        num_workers: processes that decode; None chooses.
        allow_missing_classes: go on where the data lacks some of the model's classes.
        device: "auto" (the GPU where there is one), "cpu", "cuda"; None: where it is.
        precision: of the products: "float32", which None is, "bfloat16", or "auto": bfloat16 where
            the device is fast at it and the model is not small. An exported file has its own.
        timeout: seconds to wait for images of the workers; 0 waits for ever.
        on_batch: called with every batch once it is done, for a progress bar.

    Raises:
        UserError: no such data, or its classes are not the model's; the model has no head or knows
            one class only; no image can be decoded, or the logits of one are not finite.
    """
    measured = Measured(data) if not isinstance(data, str | Path) else None
    measured = measured or open_measured(getattr(model, "source", None), str(data))
    part = evaluate_part(
        model,
        measured.source,
        batch_size=batch_size,
        num_workers=num_workers,
        allow_missing_classes=allow_missing_classes,
        device=device,
        precision=precision,
        timeout=timeout,
        on_batch=on_batch,
    )
    result = join_parts(model, measured.source, [part])
    refuse_not_finite(result, measured.source)
    return measured.describe(result)


def measure(
    model: ImageClassifier,
    source: Source,
    config: TrainConfig,
    compute: ComputePolicy,
    world: World,
) -> Evaluation:
    """Returns what the model makes of all images, whatever its logits are.

    Args:
        model: whole, the same on every process.
        source: the images.
        config, compute, world: of the run.

    Raises:
        UserError: none of the images can be decoded.
    """
    each = math.ceil(len(source) / world.size)  # no process is to wait for one full batch
    return evaluate_together(
        model,
        source,
        world,
        batch_size=max(1, min(256, config.batch_size // world.size, each)),
        num_workers=config.data.num_workers,
        allow_missing_classes=True,
        device=str(compute.device),
        precision=compute.precision,
        timeout=config.data.timeout,
    )


def evaluate_together(
    model: ImageClassifier,
    source: Source,
    world: World,
    *,
    batch_size: int,
    num_workers: int | None = None,
    allow_missing_classes: bool = False,
    device: str | None = None,
    precision: str | None = None,
    timeout: float = TIMEOUT,
    on_batch: Callable[[Batch], None] | None = None,
) -> Evaluation:
    """Returns what the model makes of all images; with one batch size the batches, and so the
    numbers, are the same on any number of processes.

    Args:
        model: whole, the same on every process.
        source: all of the images.
        world: the processes.
        batch_size, num_workers, allow_missing_classes, device, precision, timeout, on_batch: as
            of `evaluate`.

    Raises:
        UserError: as `evaluate`, but for logits that are not finite.
    """
    part = evaluate_part(
        model,
        source,
        rank=world.rank,
        size=world.size,
        batch_size=batch_size,
        num_workers=num_workers,
        allow_missing_classes=allow_missing_classes,
        device=device,
        precision=precision,
        timeout=timeout,
        on_batch=on_batch,
    )
    return join_parts(model, source, world.gather(part))
