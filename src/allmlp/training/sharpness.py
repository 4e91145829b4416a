"""Sharpness-aware minimisation: the gradient is taken where the loss is worst near the weights.

Source: Foret et al. 2021, arXiv 2010.01412. Google's checkpoints `sam` were trained so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from allmlp.runtime.world import full_tensor
from allmlp.training.settings import OptimizerSettings


def sharpness_at(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """Returns the radius rho of a step; 0 where the gradient is taken at the weights themselves.

    Args:
        settings: with `sharpness` and `sharpness_from`.
        step: from 0.
        num_steps: of the whole run.
    """
    return settings.sharpness if step >= round(settings.sharpness_from * num_steps) else 0.0


@contextlib.contextmanager
def sharpest_point(parameters: Iterable[Tensor], radius: float) -> Iterator[None]:
    """Moves the weights to where the loss is worst near them, for as long as the block lasts.

    To first order that is w + radius * g / ||g||: g are the gradients that they hold, and the norm
    is over all of them (equation 2 with p = 2). Weights that hold none stay. When the block ends,
    also by an exception, all have exactly their former values again.

    The gradients stay as they are: the block puts in new ones, and the optimiser's step with them
    comes after it. Where processes train together, g is that of the whole batch, so that one move
    is made everywhere (the paper's m is the batch). A gradient that is not finite moves weights to
    NaN, which the second gradient then shows.

    Args:
        parameters: with gradients; all processes call this together, each with its shards.
        radius: rho, the length of the move.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    former = [parameter.detach().clone() for parameter in moved]
    try:
        _climb(moved, radius)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(moved, former, strict=True):
                parameter.copy_(values)


@torch.no_grad()
def _climb(parameters: list[Tensor], radius: float) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = full_tensor(get_total_norm(gradients))
    scale = torch.where(norm == 0.0, 0.0, radius / norm)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.add_(gradient * scale)
