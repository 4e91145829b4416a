"""How the weights move: clipping, the optimisers and their state by name, the running average.

Weight decay is decoupled and reaches kernels only: the weights of the stem, of dense layers and of
the head, no bias and no LayerNorm (big_vision's `.*/kernel$`). Everything here works on plain
parameters and on those that FSDP2 has sharded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from allmlp.errors import UserError
from allmlp.models.layers import is_hidden_kernel
from allmlp.runtime.world import full_tensor
from allmlp.training.settings import OptimizerSettings


def build_optimizers(model: nn.Module, settings: OptimizerSettings) -> list[Optimizer]:
    """Returns the optimisers over the parameters that require a gradient; `update` steps them.

    One for "adamw" and "sgd". For "muon" two: Muon (Jordan et al. 2024) for the 2-D kernels inside
    the blocks, which are the dense weights of token and channel mixing, and AdamW for the rest:
    stem, head, norms and biases, and kernels with a third axis (untied token mixing, CycleFC).
    Muon's updates are scaled to the size of Adam's (Liu et al. 2025, arXiv 2502.16982, section
    2.2), so that both take the same rate and decay.

    Their state exists from here on, as it is before the first step: all zeros. torch would make it
    within that step; so a run has the same tensors at all times, and can be saved before it begins.

    Args:
        model: on its device and, with FSDP2, already sharded: sharding puts in new parameters.
        settings: with `name`, `weight_decay`, `beta1`, `beta2` and `momentum`.

    Raises:
        UserError: "muon", and the model has no such kernels or they are frozen.
    """
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    rate, optimizers = settings.learning_rate, []
    if settings.name == "sgd":
        optimizers.append(SGD(trained.values(), lr=rate, momentum=settings.beta1))
    elif settings.name == "muon":
        names = [name for name, each in trained.items() if is_hidden_kernel(name, each)]
        hidden = {name: trained.pop(name) for name in names}
        if not hidden:
            what = "optimizer.name=muon has nothing to move: no 2-D weights of blocks are trained"
            raise UserError(what, fix="--set optimizer.name=adamw, or --set model.trained=all")
        muon = Muon(
            hidden.values(),
            lr=rate,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers += [muon, _adamw(trained, settings)]
    else:
        optimizers.append(_adamw(trained, settings))
    for optimizer in optimizers:
        _begin_state(optimizer)
    return optimizers


def is_kernel(name: str, parameter: Tensor) -> bool:
    """Says whether a parameter is what Flax calls a kernel, which weight decay reaches."""
    return parameter.dim() > 1 and not name.endswith("bias")


def _adamw(trained: dict[str, nn.Parameter], settings: OptimizerSettings) -> AdamW:
    kernels = [each for name, each in trained.items() if is_kernel(name, each)]
    others = [each for name, each in trained.items() if not is_kernel(name, each)]
    groups: list[dict[str, Any]] = [
        {"params": kernels, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return AdamW(groups, lr=settings.learning_rate, betas=betas, eps=1e-8, fused=True)


def _begin_state(optimizer: Optimizer) -> None:
    """Makes the state by a step of stand-ins, so that no weight and no gradient is touched."""
    kind: Any = type(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            stand_in = torch.zeros_like(parameter)
            stand_in.grad = torch.zeros_like(stand_in)
            twin = kind([{**group, "params": [stand_in]}])
            twin.step()
            state = twin.state[stand_in]
            optimizer.state[parameter] = {key: value.zero_() for key, value in state.items()}


def clip(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Clips the gradients, in place, to a global norm, and returns the norm that they had.

    A norm that is not finite makes gradients NaN: look at it before `update`.

    Args:
        parameters: with gradients; all processes call this together, each with its shards.
        most: the largest global L2 norm, above 0.

    Returns:
        The norm before clipping, over all shards: a scalar on the parameters' device.
    """
    return full_tensor(clip_grad_norm_(parameters, most))


def update(optimizers: list[Optimizer], rate: float) -> None:
    """Moves the weights by one step along the gradients that they hold.

    Args:
        optimizers: as `build_optimizers` returns them.
        rate: the learning rate of this step, for all of them.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def optimizer_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Returns the whole state of the optimisers, as "<parameter>.<what>" -> tensor.

    These are the tensors that the next step reads and writes. With the weights, they are all that
    goes on: filled in place from another run, training continues that run bit for bit. `what` is
    `exp_avg`, `exp_avg_sq` and `step` (a scalar) of AdamW, `momentum_buffer` of SGD and Muon; SGD
    without momentum has none.

    Args:
        model, optimizers: as they went into and came out of `build_optimizers`.
    """
    named = dict(model.named_parameters())
    held = {id(each) for o in optimizers for group in o.param_groups for each in group["params"]}
    assert held <= {id(each) for each in named.values()}, "parameters were replaced since"
    return {
        f"{name}.{key}": tensor
        for name, parameter in named.items()
        for optimizer in optimizers
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """Moves the running average of the weights (Polyak and Juditsky 1992) towards them, in place.

    The decay rises to `decay` over the first steps, so that the random start is soon forgotten.

    Args:
        average: parameter name -> average, of the parameter's shape and sharding; not empty.
        model: with the present weights.
        decay: of the average, at least 0 and below 1.
        step: from 0.
    """
    decay = min(decay, (1 + step) / (10 + step))
    weights = dict(model.named_parameters())
    means: list[Tensor] = list(average.values())
    values: list[Tensor] = [weights[name] for name in average]
    get_ema_multi_avg_fn(decay)(means, values, step)
