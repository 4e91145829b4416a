"""The losses of Google's code: sigmoid cross-entropy to pre-train, softmax to fine-tune."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Returns float32 targets (N, num_classes) of int64 labels (N,)."""
    return F.one_hot(labels, num_classes).float()


def loss_function(
    logits: Tensor, targets: Tensor, kind: str, label_smoothing: float = 0.0
) -> Tensor:
    """Returns the mean loss over the batch, a scalar.

    It is a mean over images, whatever their classes: the loss of a batch in parts is the sum of
    the parts' losses, each times its share of the images.

    Args:
        logits, targets: (N, num_classes); rows of the targets sum to 1.
        kind: "softmax" cross-entropy, or "sigmoid" cross-entropy summed over the classes.
        label_smoothing: share of each target spread over all classes; softmax only.
    """
    if kind == "sigmoid":
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return each.sum(dim=1).mean()
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
