"""What a run does to the head before it starts: train nothing else, and where its bias begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from allmlp.errors import UserError


def freeze_all_but_head(model: nn.Module) -> None:
    """Lets nothing but `model.head` be trained: a linear probe.

    Raises:
        UserError: the model has no head.
    """
    head = _head_of(model)
    model.requires_grad_(False)
    head.requires_grad_(True)


def start_head_bias(model: nn.Module, value: float, rows: Sequence[int] | None = None) -> None:
    """Fills the bias of `model.head`, in place; for rows that have learned nothing yet, None: all.

    Google begins with -6.9, about the logarithm of 1/1000, on ImageNet-1k's 1000 classes and the
    sigmoid loss (big_vision, `configs/mlp_mixer_i1k.py`, `init_head_bias`).

    Raises:
        UserError: the model has no head.
    """
    with torch.no_grad():
        _head_of(model).bias[slice(None) if rows is None else list(rows)] = value


def _head_of(model: nn.Module) -> nn.Linear:
    head = getattr(model, "head", None)
    if head is None:
        what = "the model has no head: it gives features, not classes"
        raise UserError(what, fix="Create or load it without num_classes=0")
    return head
