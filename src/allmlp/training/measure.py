"""Evaluation by all processes of a run."""

from __future__ import annotations

import math

from allmlp.data.source import Source
from allmlp.evaluation.metrics import Evaluation, evaluate_source
from allmlp.evaluation.predictor import Predictor
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.device import ComputePolicy
from allmlp.runtime.world import World
from allmlp.training.config import TrainConfig


def measure(
    model: ImageClassifier,
    source: Source,
    config: TrainConfig,
    compute: ComputePolicy,
    world: World,
) -> Evaluation:
    """Returns what the model of a run predicts for all images, whatever its logits are.

    Args:
        model: whole, the same on every process.
        source: the images.
        config, compute, world: of the run.
    """
    images_each = math.ceil(len(source) / world.size)  # no process waits for one full batch
    predictor = Predictor(
        model,
        device=str(compute.device),
        precision=compute.precision,
        batch_size=max(1, min(256, config.batch_size // world.size, images_each)),
        num_workers=config.data.num_workers,
        timeout=config.data.timeout,
    )
    return evaluate_source(predictor, source, allow_missing_classes=True, world=world)
