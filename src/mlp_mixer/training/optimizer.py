"""How the weights move: groups, optimiser, schedule, losses. All as Google's code has them.

Weight decay is decoupled and reaches kernels only: the weights of the stem, of dense layers and of
the head, no bias and no LayerNorm (big_vision's `.*/kernel$`). The schedule is a pure function of
the step and starts at step 0 with a rate of 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mlp_mixer.training.config import OptimizerSettings


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Returns the optimiser over all parameters of the model; the loop sets its rate each step."""
    kernels = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    if settings.name == "sgd":
        return torch.optim.SGD(
            [*kernels, *others], lr=settings.learning_rate, momentum=settings.beta1
        )
    groups = [
        {"params": kernels, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=1e-8, fused=True)


def learning_rate(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """Returns the rate of a step: a linear rise to the peak, then cosine or linear decay.

    Args:
        settings: with `learning_rate`, `warmup`, `schedule` and `final`.
        step: from 0.
        num_steps: of the whole run.
    """
    warmup_steps = round(settings.warmup * num_steps)
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    progress = min(max(progress, 0.0), 1.0)
    if settings.schedule == "cosine":
        decay = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        decay = 1.0 - progress
    scale = settings.final + (1.0 - settings.final) * decay
    rise = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return settings.learning_rate * scale * rise


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Returns float32 targets (N, num_classes) of int64 labels (N,)."""
    return F.one_hot(labels, num_classes).float()


def loss_function(
    logits: Tensor, targets: Tensor, kind: str, label_smoothing: float = 0.0
) -> Tensor:
    """Returns the mean loss over the batch, a scalar.

    Args:
        logits, targets: (N, num_classes); rows of the targets sum to 1.
        kind: "softmax" cross-entropy, or "sigmoid" cross-entropy summed over the classes.
        label_smoothing: share of each target spread over all classes; softmax only.
    """
    if kind == "sigmoid":
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return each.sum(dim=1).mean()
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves the running average of the weights towards the model's, in place.

    The decay rises to `decay` over the first steps, so that the random start is soon forgotten.

    Args:
        average, model: of the same architecture.
        decay: of the average, at least 0 and below 1.
        step: from 0.
    """
    decay = min(decay, (1 + step) / (10 + step))
    means: list[Tensor] = list(average.parameters())
    values: list[Tensor] = list(model.parameters())
    get_ema_multi_avg_fn(decay)(means, values, step)
