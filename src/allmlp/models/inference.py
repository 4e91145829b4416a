"""Inference over many batches; on a CPU with packed weights.

torch's dense layers reorder their weights for oneDNN in every call. Here they are packed once, and
the GELU of an MLP is computed while its input is in the cache: a copy of the model gets other dense
layers and shares everything else. Results equal torch's up to rounding (benchmarks/inference.md).

Shapes: N batch, K classes, C features.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allmlp.console import Reporter
from allmlp.errors import one_of
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.device import (
    SMALL_STEP,
    Compiler,
    check_bfloat16,
    exact_matmuls,
    fast_precision,
    has_fast_bfloat16,
    pays_to_compile,
    step_threads,
)

# glibc returns activations above 32 MiB to the system and pages them in again at every layer; they
# also fall out of the cache: Mixer-B/16 was 10 % slower with batches of 32 than with 8 or 16.
LARGEST_ACTIVATION = 24 * 2**20  # bytes
PRECISIONS = ("float32", "bfloat16", "auto")
# Model size is judged at this batch size whatever the real one is: the logits of an image must not
# depend on how many others are in the batch.
_IMAGES = 8


def choose_precision(model: ImageClassifier, name: str | None) -> tuple[str, str]:
    """Returns the inference precision of the matmuls, and why. "auto" means bfloat16 if the device
    is fast at it and the model is large enough."""
    why = "chosen" if name else "the default"
    name = str(one_of("precision", name or "float32", PRECISIONS, where="precision"))
    if name == "auto":
        return fast_precision(model.device, model.config.flops * _IMAGES)
    if name == "bfloat16":
        check_bfloat16(model.device)
    return name, why


class Inference:
    """A model prepared for inference, in evaluation mode.

    The weights are captured at construction; the model itself and its mode do not change. Matmuls
    run in `precision`, "float32" or "bfloat16"; results are always float32. `packed` says whether
    dense layers are packed; batches larger than `most` are split.
    """

    def __init__(self, model: ImageClassifier, precision: str = "float32") -> None:
        self.model, self.precision = model, precision
        self.device = model.device
        is_large = model.config.flops * _IMAGES >= SMALL_STEP
        can = self.device.type == "cpu" and is_large and can_pack(precision)
        self.packed, self.most = can and bool(packable(model)), None
        self._network = model
        if self.packed:
            self._network = pack(model, precision)
            # Values in the largest activation of an image; not every family knows.
            if widest := getattr(model.config, "widest", None):
                width = 2 if precision == "bfloat16" else 4
                self.most = max(1, LARGEST_ACTIVATION // (widest * width))
        elif precision == "bfloat16":
            self._network = _with_exact_head(model)
            if self.device.type == "cuda":
                _round_weights(self._network)
        self._compiled_for, self._compiled = -1, dict[str, Any]()  # images; method -> function

    def compile_for(self, num_images: int, batch_size: int) -> None:
        """Compiles for batches of one size, if that pays off for so many images."""
        batches, operations = math.ceil(num_images / batch_size), self.model.config.flops
        is_new = batch_size != self._compiled_for
        if is_new and pays_to_compile(self.device, operations * batch_size, batches):
            compiler, network = Compiler(Reporter(stderr=True).say), self._network
            self._compiled_for = batch_size
            self._compiled = {"forward": compiler(network), "features": compiler(network.features)}

    def logits(self, images: Tensor) -> Tensor:
        """Returns logits, float32 (N, K), of normalised images on the model's device, or features
        if the model has no head."""
        return self._compute("forward", images)

    def features(self, images: Tensor) -> Tensor:
        """Returns the pooled features, float32 (N, C), of the same kind of images."""
        return self._compute("features", images)

    @torch.inference_mode()
    def _compute(self, name: str, images: Tensor) -> Tensor:
        function = self._network if name == "forward" else self._network.features
        half = self.precision == "bfloat16"
        # A copy is always in evaluation mode; setting the mode takes a millisecond.
        is_copy = self._network is not self.model
        with (
            step_threads(self.device, self.model.config.flops * len(images)),
            exact_matmuls(self.device),
            nullcontext() if is_copy else evaluating(self._network),
            torch.autocast(self.device.type, torch.bfloat16, enabled=half),
        ):
            missing = self._compiled_for - len(images)
            if missing >= 0:  # one shape, one program
                padded = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else images
                return self._compiled[name](padded)[: len(images)].float()
            if self.most is None or len(images) <= self.most:
                return function(images).float()
            parts = images.tensor_split(math.ceil(len(images) / self.most))
            return torch.cat([function(part).float() for part in parts])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode for the block, then restores its mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class PackedDense(nn.Module):
    """A dense layer with weights packed for oneDNN; computes in and returns `dtype`. `gelu` is
    "tanh", "none" (torch's exact GELU) or None."""

    def __init__(
        self, dense: nn.Linear, dtype: torch.dtype, gelu: str | None = None, has_bias: bool = True
    ) -> None:
        super().__init__()
        weight, bias = dense.weight.detach().to(dtype), dense.bias if has_bias else None
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype, self.gelu = dtype, gelu

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        after = ("none", "") if self.gelu is None else ("gelu", self.gelu)
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.weight, self.bias, after[0], [], after[1]
        )


class ExactDense(nn.Linear):
    """A dense layer that stays float32 under autocast. The head is small, and bfloat16 rounds a
    logit of 10 to a 16th, which makes probable classes tie."""

    def forward(self, input: Tensor) -> Tensor:  # (N, C) -> (N, K)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight, self.bias)


def packable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Returns (calling module, attribute name) of the float32 layers without hooks that our own
    modules call: other code, such as timm's, may read a weight instead of calling its layer."""
    return [
        (module, name)
        for module in model.modules()
        if type(module).__module__.startswith("allmlp.") or type(module) is nn.Sequential
        for name, child in module.named_children()
        if type(child) is nn.Linear
        and not (module is model and name == "head")
        and child.weight.dtype == torch.float32
        and not (child._forward_hooks or child._forward_pre_hooks)
    ]


def pack(model: ImageClassifier, precision: str) -> ImageClassifier:
    """Returns a copy in evaluation mode with packed dense layers; everything else is shared."""
    network = _with_exact_head(model)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    without_effect = _biases_without_effect(network)
    for module, name in packable(network):
        gelu = None
        if getattr(type(module), "before_gelu", None) == name:
            after = module.get_submodule("gelu")
            if isinstance(after, nn.GELU):  # not the gate of a gated MLP
                gelu = after.approximate
                module.add_module("gelu", nn.Identity())
        dense = getattr(module, name)
        has_bias = id(dense.bias) not in without_effect
        setattr(module, name, PackedDense(dense, dtype, gelu, has_bias))
    return network


def _biases_without_effect(network: ImageClassifier) -> set[int]:
    """Returns the ids of the biases that, according to the model, change no logit; an empty set if
    anything but our own blocks and their LayerNorms may read the tokens."""
    biases, modules = network.biases_without_effect(), list(network.modules())
    is_ours = all(type(m).__module__.startswith(("allmlp.models.", "torch.")) for m in modules)
    norms = sum(type(module) is nn.LayerNorm for module in modules)
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    is_safe = is_ours and not hooks and norms == 2 * len(biases) + 1
    return {id(bias) for bias in biases if is_safe}


def _with_exact_head(model: ImageClassifier) -> ImageClassifier:
    """Returns a copy in evaluation mode that shares all tensors and keeps its head in float32."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    network = copy.deepcopy(model, shared).eval()
    if type(network.head) is nn.Linear and network.head.weight.dtype == torch.float32:
        network.head.__class__ = ExactDense
    return network


def _round_weights(network: ImageClassifier) -> None:
    """Rounds the weights to bfloat16 once, as autocast would do for every batch."""
    for module, name in packable(network):
        dense = cast(nn.Linear, module.get_submodule(name))
        dense.weight = nn.Parameter(dense.weight.detach().bfloat16(), requires_grad=False)


@functools.cache
def can_pack(precision: str) -> bool:
    """Returns whether packed matmuls are available, fast and correct on this CPU. torch's operators
    for them are undocumented, so their results are checked."""
    if precision == "bfloat16" and not has_fast_bfloat16():
        return False
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    dense = nn.Linear(64, 48, device="meta")  # skip_init would import sympy, for 0.2 s
    random = torch.Generator().manual_seed(0)
    for name, tensor in list(dense.named_parameters()):
        setattr(dense, name, nn.Parameter(torch.randn(tensor.shape, generator=random) / 8))
    with torch.inference_mode():
        x = torch.randn(2, 40, 64, generator=random)
        try:
            exact = F.gelu(dense.double()(x.double()), approximate="tanh")
            found = PackedDense(dense.float(), dtype, "tanh")(x)
        except (AttributeError, RuntimeError):  # other torch build or processor
            return False
        error = (found.double() - exact).abs().max() / exact.abs().max()
    return bool(error <= (2e-2 if precision == "bfloat16" else 1e-5))
