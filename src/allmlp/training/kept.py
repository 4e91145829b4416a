"""What autograd keeps of an image in any model, counted on tensors of shapes and no contents.

For a Mixer `cost.py` has a formula; this counts the same for every other architecture.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from allmlp.models.catalog import family_of, model_from_config
from allmlp.models.layers import is_hidden_kernel


def is_known(config: object) -> bool:
    """Says whether `model_from_config` builds such an architecture."""
    try:
        return bool(family_of(config))
    except TypeError:
        return False


@functools.lru_cache(maxsize=32)
def kept_of_one_image(config: Any, bfloat16: bool) -> tuple[int, int]:
    """Returns the bytes kept of one image from the forward to the backward pass, and of them the
    bytes of the largest tensor.

    Nothing is computed and no random number drawn. What is kept once, whatever the number of images
    (copies of weights), is left out.

    Args:
        config: of the model, see `is_known`.
        bfloat16: whether products are computed in it.
    """
    with torch.device("meta"):
        model = model_from_config(config).train()
    with FakeTensorMode():
        # Two at least: batch normalisation trains on no single number.
        (one, largest), (two, _) = (_kept(model, config, number, bfloat16) for number in (2, 3))
    return two - one, largest


def _kept(model: nn.Module, config: Any, num_images: int, bfloat16: bool) -> tuple[int, int]:
    # In the place of the model's tensors, which are on no device: those of a CPU, without contents.
    tensors = {
        name: torch.empty(each.shape, dtype=each.dtype, requires_grad=each.requires_grad)
        for name, each in [*model.named_parameters(), *model.named_buffers()]
    }
    own = {each.untyped_storage()._cdata for each in tensors.values()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor
        return tensor

    images = torch.empty(num_images, config.in_channels, *config.image_size)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        logits = functional_call(model, tensors, images).float()
        loss = F.cross_entropy(logits, torch.empty_like(logits))
    assert loss.requires_grad
    sizes = [each.untyped_storage().nbytes() for each in kept.values()]
    return sum(sizes), max(sizes) // num_images


@functools.lru_cache(maxsize=32)
def block_matrices(config: Any) -> int:
    """Returns how many numbers the 2-D weights inside the blocks have, which Muon moves.

    Args:
        config: of the model, see `is_known`.
    """
    with torch.device("meta"):
        model = model_from_config(config)
    named = model.named_parameters()
    return sum(each.numel() for name, each in named if is_hidden_kernel(name, each))
