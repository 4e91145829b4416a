"""Loss, learning rate, optimizers, SAM and EMA, for plain and FSDP2-sharded parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from allmlp.data.source import Source
from allmlp.errors import UserError
from allmlp.models.layers import is_hidden_kernel
from allmlp.runtime.world import full_tensor
from allmlp.training import config as settings_of
from allmlp.training.config import Optimizer, Sigmoid, Softmax, Steps


def loss_function(
    logits: Tensor,
    targets: Tensor,
    loss: Softmax | Sigmoid,
    class_weights: Tensor | None = None,
    positive_weights: Tensor | None = None,
) -> Tensor:
    """Returns the mean loss over images; logits and targets, whose rows sum to 1, are (N, classes).
    With `class_weights`, (classes,), that of an image is the sum over the classes c of target *
    weight * (the loss if it were c); `positive_weights` multiply the sigmoid losses where a label
    is present."""
    if class_weights is not None:
        targets = targets * class_weights
        total = targets.sum(dim=1, keepdim=True)
        if isinstance(loss, Sigmoid):
            return (total * F.softplus(logits) - targets * logits).sum(dim=1).mean()
        smoothed = (1.0 - loss.label_smoothing) * targets
        return F.cross_entropy(logits, smoothed + total * (loss.label_smoothing / len(logits[0])))
    if isinstance(loss, Sigmoid):
        losses = F.binary_cross_entropy_with_logits(
            logits, targets, reduction="none", pos_weight=positive_weights
        )
        return losses.sum(dim=1).mean()
    return F.cross_entropy(logits, targets, label_smoothing=loss.label_smoothing)


def balance_weights(train: Source) -> np.ndarray:
    """Returns the weight of each class, float64 (classes,): images / (classes with images * images
    of the class), scikit-learn's "balanced"; or, of multi-label images, that of a label where it is
    present: images without it / images with it, of which there is at least one each."""
    counts = train.class_counts()
    if train.is_multi_label:
        return np.maximum(len(train) - counts, 1) / np.maximum(counts, 1)
    weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0.0)


# The learning rate is a pure function of the step, 0 at step 0 with warm-up. Source:
# `create_learning_rate_schedule` of big_vision's utils.py; stepwise decay as in
# google-research/task_adaptation and bit_hyperrule.py: the boundary step still has the old rate.


def learning_rate(optimizer: Optimizer, step: int, num_steps: int) -> float:
    warmup, schedule = warmup_steps(optimizer, num_steps), optimizer.schedule
    progress = (step - warmup) / max(num_steps - warmup, 1)
    progress = min(max(progress, 0.0), 1.0)
    rise = min(1.0, step / warmup) if warmup else 1.0
    if isinstance(schedule, Steps):
        ends = (round(at * num_steps) if at < 1 else at for at in schedule.decay_at)
        scale = schedule.decay_factor ** sum(step > end for end in ends)
        return optimizer.learning_rate * scale * rise
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    decay = cosine if schedule.name == "cosine" else 1.0 - progress
    scale = schedule.final_lr_fraction + (1.0 - schedule.final_lr_fraction) * decay
    return optimizer.learning_rate * scale * rise


def warmup_steps(optimizer: Optimizer, num_steps: int) -> int:
    """Returns the first step at the full learning rate."""
    return round(optimizer.warmup * num_steps if optimizer.warmup < 1 else optimizer.warmup)


def check_warmup(optimizer: Optimizer, num_steps: int) -> None:
    warmup = warmup_steps(optimizer, num_steps)
    if warmup >= num_steps:
        what = f"optimizer.warmup={optimizer.warmup:g} is {warmup:,} steps of warm-up, and the "
        what += f"whole run has {num_steps:,}: it would never reach its learning rate"
        raise UserError(what, fix="optimizer.warmup=0.1 (a tenth of the run), or more epochs")


def operations(flops_per_image: int, images: int, settings: Optimizer) -> int:
    """Returns the FLOPs of a run: a step costs three forward passes, one with SAM six."""
    twice = 1.0 - settings.sam_start if settings.sam_rho else 0.0
    return round(3 * flops_per_image * images * (1.0 + twice))


def power(number: int) -> str:
    digits, _, exponent = f"{number:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def state_copies(settings: Optimizer) -> int:
    moments = bool(settings.momentum) if isinstance(settings, settings_of.SGD) else 2
    return 2 + moments + bool(settings.ema_decay) + bool(settings.sam_rho)


def build_optimizers(model: nn.Module, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Returns the optimizers of the parameters that require a gradient, with their state, all
    zeros. Weight decay is decoupled and for kernels only (big_vision's `.*/kernel$`). With Muon
    (Jordan et al. 2024) there are two: Muon for the dense weights of token and channel mixing, at
    AdamW's learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2), and AdamW for the
    rest."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rate, optimizers = settings.learning_rate, []
    if isinstance(settings, settings_of.SGD):
        # On a GPU fused, as only then it refuses non-finite updates itself (`Updater`).
        fused = all(parameter.is_cuda for parameter in trained.values()) or None
        options = {"lr": rate, "momentum": settings.momentum, "fused": fused}
        optimizers.append(torch.optim.SGD(trained.values(), **options))
    else:
        if isinstance(settings, settings_of.Muon):
            hidden_names = [n for n, parameter in trained.items() if is_hidden_kernel(n, parameter)]
            hidden = [trained.pop(name) for name in hidden_names]
            if not hidden:
                what = "optimizer=muon has nothing to train: the model has no 2-D block weights"
                raise UserError(what, fix="optimizer=adamw")
            options = {"lr": rate, "weight_decay": settings.weight_decay, "nesterov": True}
            options |= {"momentum": settings.momentum, "adjust_lr_fn": "match_rms_adamw"}
            kind = torch.optim.Muon if hidden[0].is_cuda else Float32Muon
            optimizers.append(kind(hidden, **options))
        # Kernels in Flax's sense.
        kernels = {n: p for n, p in trained.items() if p.dim() > 1 and not n.endswith("bias")}
        others = [p for name, p in trained.items() if name not in kernels]
        groups: list[dict[str, Any]] = [
            {"params": [*kernels.values()], "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=betas, eps=1e-8, fused=True))
    for optimizer in optimizers:
        _begin_state(optimizer)
    return optimizers


class Float32Muon(torch.optim.Muon):
    """PyTorch's Muon, scaled by "match_rms_adamw", with Newton-Schulz in float32: without bfloat16
    instructions PyTorch's takes longer than the rest of a step of a small model."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            rate, momentum = group["lr"], group["momentum"]
            for weight in (p for p in group["params"] if p.grad is not None):
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                average = state["momentum_buffer"]
                average.lerp_(weight.grad, 1 - momentum)
                x = weight.grad.lerp(average, momentum) if group["nesterov"] else average
                is_tall = x.shape[0] > x.shape[1]
                x = x.T if is_tall else x
                x = x / x.norm().clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):
                    gram = x @ x.T
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
                # Moonlight's scale, "match_rms_adamw" in PyTorch (arXiv 2502.16982).
                scale = 0.2 * math.sqrt(max(weight.shape))
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(x.T if is_tall else x, alpha=-rate * scale)


def _begin_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates the state with a step on dummy tensors; weights and gradients are not touched."""
    kind: Any = type(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            stand_in = torch.zeros_like(parameter)
            stand_in.grad = torch.zeros_like(stand_in)
            twin = kind([{**group, "params": [stand_in]}])
            twin.step()
            state = twin.state[stand_in]
            optimizer.state[parameter] = {key: value.zero_() for key, value in state.items()}


def update(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def optimizer_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Returns the whole optimizer state, "<parameter>.<key>" -> tensor; filling these in place
    continues another run bit for bit."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """Updates the EMA of the weights (Polyak and Juditsky 1992) in place."""
    decay = min(decay, (1 + step) / (10 + step))  # so that the random start is soon forgotten
    weights = dict(model.named_parameters())
    means: list[Tensor] = list(average.values())
    values: list[Tensor] = [weights[name] for name in average]
    get_ema_multi_avg_fn(decay)(means, values, step)


@contextlib.contextmanager
def sam_ascent(parameters: Iterable[Tensor], rho: float) -> Iterator[None]:
    """Moves the weights to w + rho * g / ||g||, about the worst loss nearby, in the block (SAM:
    Foret et al. 2021, arXiv 2010.01412, equation 2, with the whole batch as m), and restores them
    exactly. A non-finite gradient makes them NaN, which the second gradient shows."""
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    former = [parameter.detach().clone() for parameter in moved]
    try:
        with torch.no_grad():
            gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
            norm = full_tensor(get_total_norm(gradients))
            scale = torch.where(norm == 0.0, 0.0, rho / norm)
            for parameter, gradient in zip(moved, gradients, strict=True):
                parameter.add_(gradient * scale)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(moved, former, strict=True):
                parameter.copy_(values)
