"""The hidden units of a model's token-mixing MLPs and of its stem, as pictures of weights.

Figures 5, 6 and 7 of the paper show them: the incoming weights of a hidden unit of a token-mixing
MLP, one for each patch, and the patch embedding's units, one colour for each pixel. Models whose
token-mixing is of another kind give what they have, and a line that says what does not apply.

Legend: U hidden units, G_H G_W patches in a column and in a row, C channels, P patch side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from allmlp.errors import UserError
from allmlp.models.layers import ImageClassifier
from allmlp.models.mixer import MixerConfig

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TokenMixingLayer:
    """One token-mixing MLP.

    Attributes:
        number: of the layer, from 1 as in the paper.
        name: of the module, "blocks.0.token_mixing".
        incoming: (U, G_H, G_W) what each hidden unit reads of each patch.
        outgoing: (U, G_H, G_W) what it writes to each patch; None where it writes no such grid.
    """

    number: int
    name: str
    incoming: Floats
    outgoing: Floats | None


@dataclass(frozen=True)
class ModelUnits:
    """What of a model can be drawn.

    Attributes:
        layers: the token-mixing MLPs whose units are pictures, in order.
        num_layers: how many token-mixing MLPs the model has, readable or not.
        stem: (C, P, P, channels) the units of the first convolution, or None.
        notes: a line for each thing that does not apply to this model.
    """

    layers: list[TokenMixingLayer]
    num_layers: int
    stem: Floats | None
    notes: list[str] = field(default_factory=list)

    def layer(self, number: int) -> TokenMixingLayer:
        """Returns the layer of a number, from 1.

        Raises:
            UserError: the model has no such layer, or its units are no pictures.
        """
        found = next((each for each in self.layers if each.number == number), None)
        if found is not None:
            return found
        fix = None
        if self.layers:
            fix = f"Known: {', '.join(str(each.number) for each in self.layers)}"
        elif self.notes:
            fix = f"{self.notes[0]}"
        what = f"no token-mixing layer {number} that can be drawn"
        if not 1 <= number <= self.num_layers:
            what = f"no layer {number}: the model has {self.num_layers} token-mixing MLPs"
        raise UserError(what, where="--layers", fix=fix)


def model_units(model: ImageClassifier) -> ModelUnits:
    """Returns the units of every token-mixing MLP and of the stem.

    A token-mixing MLP is a module of the name `token_mixing` whose two dense layers, `dense_0` and
    `dense_1`, have one weight for each patch of the grid and are shared by all channels.

    Args:
        model: of any family.
    """
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "token_mixing"
    ]
    grid = patch_grid(model)
    layers, refused = [], {}
    for number, (name, module) in enumerate(modules, start=1):
        reason = _why_not_patches(model, number - 1) or why_no_picture(module, grid)
        if reason is not None:
            refused.setdefault(reason, []).append(number)
            continue
        weights = _dense_weights(module)
        assert grid is not None
        assert weights is not None
        incoming, outgoing = _array(weights[0]), _array(weights[1])  # (U, S), (S, U)
        fits = outgoing.ndim == 2 and outgoing.shape == incoming.shape[::-1]
        pictures = incoming.reshape(-1, *grid)
        written = outgoing.T.reshape(-1, *grid) if fits and np.isfinite(outgoing).all() else None
        layers.append(TokenMixingLayer(number, name, pictures, written))
    notes = [f"layer{_numbers(which)}: {reason}" for reason, which in refused.items()]
    if not modules:
        notes.append(
            f"{_family(model)} has no token-mixing MLP, whose hidden units read every patch: "
            "figures 5 and 6 do not apply"
        )
    stem, note = _stem_units(model)
    return ModelUnits(layers, len(modules), stem, notes + ([note] if note else []))


def _why_not_patches(model: ImageClassifier, block: int) -> str | None:
    """Returns why the token mixing of a block does not read one value for each patch, or None."""
    config = model.config
    if not isinstance(config, MixerConfig):
        return None
    if config.token_groups > 1:
        return f"a unit reads {config.token_groups} channels at once, and is not drawn"
    if config.tokens[block] != config.num_tokens:
        tokens = config.tokens[block]
        return f"a unit reads {tokens} tokens of a pyramid, which are no patches: not drawn"
    return None


def why_no_picture(module: nn.Module, grid: tuple[int, int] | None) -> str | None:
    """Returns why the units of a token-mixing module are no pictures over the grid, or None."""
    weights = _dense_weights(module)
    if weights is None:
        return "no MLP of two dense layers, its units are not drawn"
    weight = weights[0]
    if weight.dim() != 2:
        shape = "x".join(map(str, weight.shape))
        return (
            f"weights of {shape} are not (hidden units, patches): they are not shared by all "
            "channels, and not drawn"
        )
    if grid is None:
        return "the model has no grid of patches, its units are not drawn"
    if weight.shape[1] != grid[0] * grid[1]:
        return (
            f"a unit reads {weight.shape[1]} values, not one for each of the {grid[0]}x{grid[1]} "
            "patches, and is not drawn"
        )
    if not bool(torch.isfinite(weight).all()):
        return "weights that are not finite numbers, not drawn"
    return None


def patch_grid(model: ImageClassifier) -> tuple[int, int] | None:
    """Returns (G_H, G_W), the patches in a column and in a row; None for a model without."""
    grid = getattr(model.config, "grid", None)
    if isinstance(grid, tuple) and len(grid) == 2:
        return int(grid[0]), int(grid[1])
    return None


def stem_convolution(model: ImageClassifier) -> nn.Conv2d | None:
    """Returns the first convolution that reads the image: the patch embedding."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == model.config.in_channels:
            return module
    return None


def _stem_units(model: ImageClassifier) -> tuple[Floats | None, str | None]:
    """The stem's units; or a line that says why there is no picture of them."""
    stem = stem_convolution(model)
    if stem is None:
        return None, f"{_family(model)} has no convolution that reads the image: no figure 7"
    if stem.in_channels not in (1, 3) or stem.groups != 1:
        return None, f"units of {stem.in_channels} channels are no colours: no figure 7"
    units = _array(stem.weight).transpose(0, 2, 3, 1)  # (C, P, P, channels)
    if not np.isfinite(units).all():
        return None, "the stem's weights are not finite numbers: no figure 7"
    return units, None


def _dense_weights(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    before = getattr(getattr(module, "dense_0", None), "weight", None)
    after = getattr(getattr(module, "dense_1", None), "weight", None)
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return before, after
    return None


def _array(weight: torch.Tensor) -> Floats:
    return weight.detach().to("cpu", torch.float64).numpy()


def _family(model: ImageClassifier) -> str:
    return f"a {type(model).__name__}"


def _numbers(numbers: list[int]) -> str:
    """[3] -> " 3", [1, 2, 3] -> "s 1 to 3", [1, 4] -> "s 1, 4"."""
    if len(numbers) == 1:
        return f" {numbers[0]}"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"s {numbers[0]} to {numbers[-1]}"
    return f"s {', '.join(map(str, numbers))}"
