"""Evaluation by all processes of a run: each takes a part of the images, all get the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlp_mixer.data.batches import Batch
from mlp_mixer.data.items import Source
from mlp_mixer.data.loader import TIMEOUT
from mlp_mixer.evaluation.accuracy import Evaluation, evaluate_part, join_parts
from mlp_mixer.models.layers import ImageClassifier

if TYPE_CHECKING:  # what measures alone need not wait for torch's collectives
    from mlp_mixer.training.compute import Compute
    from mlp_mixer.training.config import TrainConfig
    from mlp_mixer.training.distributed import World


def measure(
    model: ImageClassifier, source: Source, config: TrainConfig, compute: Compute, world: World
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
