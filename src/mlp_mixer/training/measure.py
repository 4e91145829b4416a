"""Evaluation by all processes of a run: each takes a part of the images, all get the whole."""

from __future__ import annotations

import numpy as np

from mlp_mixer.data.items import Source, subset
from mlp_mixer.evaluation.accuracy import Evaluation, evaluate
from mlp_mixer.models.layers import ImageClassifier
from mlp_mixer.training.compute import Compute
from mlp_mixer.training.config import TrainConfig
from mlp_mixer.training.distributed import World


def measure(
    model: ImageClassifier, source: Source, config: TrainConfig, compute: Compute, world: World
) -> Evaluation:
    """Returns what the model makes of all images; the same numbers on any number of processes.

    Args:
        model: whole, the same on every process.
        source: the images.
        config, compute, world: of the run.

    Raises:
        UserError: none of the images can be decoded.
    """
    first, last = (len(source) * (world.rank + more) // world.size for more in (0, 1))
    share = source
    if world.size > 1:
        if len(source) < world.size:  # too few to share: all look at all of them
            first, last = 0, len(source)
        share = subset(source, np.arange(first, last), source.name)
    batch_size = max(1, min(256, config.batch_size // world.size))
    with compute.autocast():
        own = evaluate(
            model,
            share,
            batch_size=batch_size,
            num_workers=config.data.num_workers,
            allow_missing_classes=True,
            device=str(compute.device),
            timeout=config.data.timeout,
        )
    if world.size == 1 or len(share) == len(source):
        return own
    parts: list[Evaluation] = world.gather(own)
    starts = [len(source) * rank // world.size for rank in range(world.size)]
    return Evaluation(
        source.name,
        own.class_names,
        np.concatenate([each.labels for each in parts]),
        np.concatenate([each.indices + at for each, at in zip(parts, starts, strict=True)]),
        np.concatenate([each.probabilities for each in parts]),
        [bad for each in parts for bad in each.bad],
    )
