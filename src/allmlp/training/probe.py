"""A linear probe: the head of a run, fitted to the frozen features of its training images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from allmlp.data.source import BadImage
from allmlp.errors import UserError
from allmlp.evaluation.features import frozen_features
from allmlp.evaluation.predictor import Outputs, Predictor
from allmlp.evaluation.probe import fit_probe
from allmlp.models.layers import ImageClassifier
from allmlp.training.model import head_of
from allmlp.training.state import Run
from allmlp.weights.download import cache_folder


def fit_head(
    run: Run, model: ImageClassifier, on_batch: Callable[[Outputs], None]
) -> tuple[list[BadImage], float]:
    """Fits the head in place; returns the images that cannot be decoded, and the training loss.

    Features are float32 as in `mixer evaluate`, unless another precision is asked for, so that the
    predictions of the model are those of the probe.
    """
    config, train, asked = run.config, run.splits.train, run.config.precision
    predictor = Predictor(
        model,
        device=str(run.compute.device),
        precision="float32" if asked == "auto" else asked,
        batch_size=min(64, max(1, len(train) // 4)),
        num_workers=config.data.num_workers,
        timeout=config.data.timeout,
    )
    found = frozen_features(predictor, train, cache_folder() / "features", on_batch)
    for note in found.notes:
        run.report.say(f"note     {note}")
    labels = train.labels[found.indices]
    if len(np.unique(labels)) < 2:
        raise UserError("fewer than two classes have images that can be decoded", where=train.name)
    probe = fit_probe(found.values, labels, len(train.class_names))
    again = ", features from the cache" if found.from_cache else ""
    run.report.say(
        f"probe    l2 {probe.l2:g}, the best of five folds of the training images{again}"
    )
    head = head_of(model)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(probe.weight).float())
        head.bias.copy_(torch.from_numpy(probe.bias).float())
    targets = torch.from_numpy(labels.astype(np.int64))
    probabilities = torch.from_numpy(probe.probabilities(found.values)).clamp(min=1e-30)
    return found.bad, F.nll_loss(probabilities.log(), targets).item()
