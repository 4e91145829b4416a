"""The hidden units of a model's token-mixing MLPs and of its stem, and their measures.

Legend: U hidden units, G_H G_W patches in a column and in a row, C channels, P patch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from allmlp.errors import UserError
from allmlp.inspection.units import FREQUENCY_EDGES, OPPOSITE, Floats, UnitMeasures, measure_units
from allmlp.models.catalog import config_to_json
from allmlp.models.layers import ImageClassifier
from allmlp.models.mixer_config import MixerConfig


@dataclass(frozen=True)
class TokenMixingLayer:
    """One token-mixing MLP."""

    number: int  # from 1, as in the paper
    name: str  # of the module
    incoming: Floats  # (U, G_H, G_W) what each hidden unit reads from each patch
    outgoing: Floats | None  # (U, G_H, G_W) what it writes; None where that is not a grid


@dataclass(frozen=True)
class ModelUnits:
    """The units of a model that can be drawn, and their measures (of the stem in cycles per pixel).

    The measures are computed when they are first asked for.
    """

    name: str
    architecture: dict[str, Any]
    layers: list[TokenMixingLayer]
    num_layers: int  # also those that cannot be drawn
    stem_weights: Floats | None  # (C, P, P, channels) the first convolution
    notes: list[str]  # what does not apply to this model

    @cached_property
    def incoming(self) -> list[UnitMeasures]:
        """Measures of each of `layers`."""
        return [measure_units(layer.incoming) for layer in self.layers]

    @cached_property
    def outgoing(self) -> list[UnitMeasures | None]:
        """Likewise of the outgoing weights, where the layer has them."""
        outgoing = [layer.outgoing for layer in self.layers]
        return [None if weights is None else measure_units(weights) for weights in outgoing]

    @cached_property
    def stem(self) -> UnitMeasures | None:
        """Measures of the patch embedding."""
        return None if self.stem_weights is None else measure_units(self.stem_weights)

    def layer(self, number: int) -> TokenMixingLayer:
        """Returns the layer of a number, from 1."""
        found = next((layer for layer in self.layers if layer.number == number), None)
        if found is not None:
            return found
        known = ", ".join(str(layer.number) for layer in self.layers)
        what = f"layer {number} cannot be drawn"
        if not 1 <= number <= self.num_layers:
            what = f"no layer {number}: the model has {self.num_layers} token-mixing MLPs"
        fix = f"Known: {known}" if known else "".join(self.notes[:1]) or None
        raise UserError(what, where="layers", fix=fix, code="unknown-name")

    def parts(self, *, outgoing: bool) -> Iterator[tuple[str, str, UnitMeasures]]:
        """Yields the layer ("1", ..., "stem"), "incoming" or "outgoing", and the measures."""
        for at, layer in enumerate(self.layers):
            yield str(layer.number), "incoming", self.incoming[at]
            written = self.outgoing[at] if outgoing else None
            if written is not None:
                yield str(layer.number), "outgoing", written
        if self.stem is not None:
            yield "stem", "incoming", self.stem

    def to_json(self, *, outgoing: bool) -> dict[str, Any]:
        """Returns the numbers of every layer as JSON values."""
        layers = []
        for at, layer in enumerate(self.layers):
            values: dict[str, Any] = {
                "layer": layer.number,
                "module": layer.name,
                "grid": list(self.incoming[at].grid),
                "incoming": self.incoming[at].to_json(),
            }
            if outgoing:
                written = self.outgoing[at]
                values["outgoing"] = None if written is None else written.to_json()
            layers.append(values)
        return {
            "name": self.name,
            "architecture": self.architecture,
            "layers": layers,
            "stem": None if self.stem is None else self.stem.to_json(),
        }

    def unit_rows(self, *, outgoing: bool) -> Iterator[list[Any]]:
        """Yields a row of units.csv for every unit; "" where a unit has no such number."""
        for layer, weights, measures in self.parts(outgoing=outgoing):
            for unit, partner in enumerate(measures.partner.tolist()):
                values: list[Any] = [""] * 4
                if not measures.is_zero[unit]:
                    values[0] = f"{measures.frequency[unit]:.6f}"
                    values[1] = f"{measures.locality[unit]:.6f}"
                if partner >= 0:
                    values[2:] = (partner + 1, f"{measures.partner_correlation[unit]:.6f}")
                yield [self.name, layer, weights, unit + 1, *values]


def model_units(model: ImageClassifier, name: str = "model") -> ModelUnits:
    """Returns the units of every module called `token_mixing` and of the stem, in any family."""
    modules = [
        (path, module)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == "token_mixing"
    ]
    grid = patch_grid(model)
    layers: list[TokenMixingLayer] = []
    not_drawn: dict[str, list[int]] = {}
    for number, (path, module) in enumerate(modules, start=1):
        reason = _reason_not_drawn(model, number, module, grid)
        if reason is not None:
            not_drawn.setdefault(reason, []).append(number)
            continue
        assert grid is not None
        incoming, outgoing = (_array(getattr(module, f"dense_{at}").weight) for at in (0, 1))
        is_grid = outgoing.shape == incoming.shape[::-1] and np.isfinite(outgoing).all()
        written = outgoing.T.reshape(-1, *grid) if is_grid else None  # of (S, U)
        layers.append(TokenMixingLayer(number, path, incoming.reshape(-1, *grid), written))
    notes = [f"layer{_listed(numbers)} not drawn: {why}" for why, numbers in not_drawn.items()]
    if not modules:
        family = type(model).__name__
        notes.append(f"figures 5 and 6 do not apply: {family} has no token-mixing MLP")
    stem, note = _stem_units(model)
    notes += [note] if note else []
    return ModelUnits(name, config_to_json(model.config), layers, len(modules), stem, notes)


def _reason_not_drawn(
    model: ImageClassifier, number: int, module: nn.Module, grid: tuple[int, int] | None
) -> str | None:
    """Why the units of a token-mixing module are not maps over the patches, or None."""
    config = model.config
    if isinstance(config, MixerConfig):
        if config.token_groups > 1:
            return f"a unit reads {config.token_groups} channels at once"
        tokens = config.tokens[number - 1]
        if tokens != config.num_tokens:
            return f"a unit reads {tokens} tokens of a pyramid, which are not patches"
    weights = [getattr(getattr(module, f"dense_{at}", None), "weight", None) for at in (0, 1)]
    weight = weights[0]
    if not isinstance(weight, torch.Tensor) or weights[1] is None:
        return "it is not an MLP of two dense layers"
    if weight.dim() != 2:
        shape = "x".join(map(str, weight.shape))
        return f"weights of {shape} are not (hidden units, patches) shared by all channels"
    if grid is None:
        return "the model has no grid of patches"
    if weight.shape[1] != grid[0] * grid[1]:
        patches = f"{grid[0]}x{grid[1]} patches"
        return f"a unit reads {weight.shape[1]} values, not one for each of the {patches}"
    if not bool(torch.isfinite(weight).all()):
        return "some weights are not finite"
    return None


def patch_grid(model: ImageClassifier) -> tuple[int, int] | None:
    """Returns (G_H, G_W), or None for a model without a grid of patches."""
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
    """The units of the stem, or why there is no figure of them."""
    stem = stem_convolution(model)
    if stem is None:
        return None, f"no figure 7: {type(model).__name__} has no convolution that reads the image"
    if stem.in_channels not in (1, 3) or stem.groups != 1:
        return None, f"no figure 7: units of {stem.in_channels} channels are not colours"
    units = _array(stem.weight).transpose(0, 2, 3, 1)  # (C, P, P, channels)
    if not np.isfinite(units).all():
        return None, "no figure 7: some weights of the stem are not finite"
    return units, None


def _array(weight: torch.Tensor) -> Floats:
    return weight.detach().to("cpu", torch.float64).numpy()


def _listed(numbers: list[int]) -> str:
    """[3] -> " 3", [1, 2, 3] -> "s 1 to 3", [1, 4] -> "s 1, 4"."""
    if len(numbers) == 1:
        return f" {numbers[0]}"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"s {numbers[0]} to {numbers[-1]}"
    return f"s {', '.join(map(str, numbers))}"


def weight_correlations(first: ModelUnits, second: ModelUnits) -> dict[str, float]:
    """Returns the correlation of all incoming weights of two models, by layer and "stem".

    Only where both have the same shape. 1 for a model and itself; near 0 for unrelated ones.
    """
    pairs = {"stem": (first.stem_weights, second.stem_weights)}
    others = {layer.number: layer.incoming for layer in second.layers}
    for layer in first.layers:
        pairs[str(layer.number)] = (layer.incoming, others.get(layer.number))
    found = {}
    for label, (one, other) in pairs.items():
        if one is None or other is None or one.shape != other.shape:
            continue
        norms = np.linalg.norm(one) * np.linalg.norm(other)
        if norms > 0:
            found[label] = float((one * other).sum() / norms)
    return found


# What the numbers of inspection.json mean, as they stand in it.
DEFINITIONS = {
    "counting": "layers and units from 1",
    "frequency": "spectral centroid: the mean of |f| over the 2-D Fourier transform of a unit's "
    "weights, weighted by its power, with the mean (f = 0) kept; cycles per patch, for the stem "
    "cycles per pixel with the power summed over the colours",
    "histogram_edges": [round(float(edge), 3) for edge in FREQUENCY_EDGES],
    "correlation": "u . v / (|u| |v|), without removing the mean",
    "partner_correlation": "of each unit with its most negative other unit of the layer",
    "opposite_share": f"fraction of units whose partner_correlation is below {OPPOSITE}",
    "weights_correlation": "of all incoming weights of a layer with those of the compared model",
    "locality": "fraction of a unit's energy in the best axis-aligned window of half the height "
    "and half the width, rounded up",
    "zero_units": "units whose weights are all zero; no other number includes them",
}
