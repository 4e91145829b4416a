"""Hidden units of a model's token-mixing MLPs and stem, as weights on a grid, and their measures.

Shapes: U units, G_H G_W the grid (height, width), C channels, P_h P_w the patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from allmlp.errors import UserError
from allmlp.models.catalog import config_to_json
from allmlp.models.layers import ImageClassifier
from allmlp.models.mixer import MixerConfig

OPPOSITE = -0.8  # "opposite_share": the fraction of units with a lower correlation to another
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# --- measures ---


@dataclass(frozen=True)
class UnitMeasures:
    """Measures of the units of one layer, (U,) each; NaN for all-zero units."""

    grid: tuple[int, int]
    frequency: Floats
    locality: Floats
    partner: Integers  # unit with the most negative correlation, from 0; -1 if none
    partner_correlation: Floats

    @property
    def is_zero(self) -> NDArray[np.bool_]:
        return np.isnan(self.frequency)

    def to_json(self) -> dict[str, Any]:
        """Returns the distributions over units; None if no unit has a value."""
        known = self.partner_correlation[~np.isnan(self.partner_correlation)]
        return {
            "units": len(self.frequency),
            "zero_units": int(self.is_zero.sum()),
            "frequency": _distribution(self.frequency),
            "opposite_share": float((known < OPPOSITE).mean()) if len(known) else None,
            "partner_correlation": _distribution(self.partner_correlation),
            "locality": _distribution(self.locality),
            "locality_of_a_constant": window_fraction(self.grid),
        }


def measure_units(units: ArrayLike) -> UnitMeasures:
    """Measures units, (U, G_H, G_W) or (U, G_H, G_W, channels)."""
    values = _scaled(units)
    is_zero = _zero_units(values)
    table = _opposites_table(values)
    partner = table.argmin(axis=1)
    correlation = table[np.arange(len(table)), partner]
    missing = is_zero | np.isinf(correlation)
    return UnitMeasures(
        (values.shape[1], values.shape[2]),
        np.where(is_zero, np.nan, spatial_frequency(values)),
        np.where(is_zero, np.nan, locality(values)),
        np.where(missing, -1, partner),
        np.where(missing, np.nan, correlation),
    )


def spatial_frequency(units: ArrayLike) -> Floats:
    """Returns each unit's mean |f| over its 2-D Fourier transform, weighted by power; f is in
    cycles per grid step, from -1/2 to 1/2 on each axis: 0 for a constant, at most sqrt(1/2)."""
    values = _scaled(units)
    height, width = values.shape[1:3]
    power = _over_channels(np.abs(np.fft.fft2(values, axes=(1, 2))) ** 2)
    length = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    total = power.sum(axis=(1, 2))
    return (power * length).sum(axis=(1, 2)) / np.where(total > 0, total, 1.0)


def locality(units: ArrayLike) -> Floats:
    """Returns the fraction of each unit's energy in its best window of half the grid's sides: 1 for
    a point, `window_fraction` for a constant."""
    energy = _over_channels(_scaled(units) ** 2)
    window = _window(energy.shape[1:3])
    inside = np.lib.stride_tricks.sliding_window_view(energy, window, axis=(1, 2))
    best = inside.sum(axis=(3, 4)).max(axis=(1, 2))
    total = energy.sum(axis=(1, 2))
    return np.minimum(best / np.where(total > 0, total, 1.0), 1.0)


def correlations(units: ArrayLike) -> Floats:
    """Returns u . v / (|u| |v|) for all pairs of units, (U, U); 0 for all-zero units. The mean is
    not removed, so -1 means an inverse even if both are constant."""
    values = _scaled(units)
    values = values.reshape(len(values), -1)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    directions = values / np.where(norms > 0, norms, 1.0)
    return np.clip(directions @ directions.T, -1.0, 1.0)


def pair_opposites(units: ArrayLike) -> Integers:
    """Returns the order of figure 5: the remaining unit of lowest frequency, then the remaining one
    with the most negative correlation to it, and so on; all-zero units come last."""
    values = _scaled(units)
    is_zero, table = _zero_units(values), _opposites_table(values)
    order: list[int] = []
    is_left = np.ones(len(values), dtype=bool)
    for first in np.lexsort((spatial_frequency(values), is_zero)):
        if not is_left[first]:
            continue
        is_left[first] = False
        order.append(first)
        left = np.flatnonzero(is_left)
        if len(left):
            second = left[table[first, left].argmin()]
            is_left[second] = False
            order.append(second)
    return np.array(order, dtype=np.int64)


def window_fraction(grid: tuple[int, int]) -> float:
    """Returns the area fraction of the window in `locality`: the locality of a constant."""
    height, width = _window(grid)
    return height * width / (grid[0] * grid[1])


def _distribution(values: Floats) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    mean = float(known.mean()) if len(known) else None
    quantiles = np.quantile(known, QUANTILES).tolist() if len(known) else [None] * len(QUANTILES)
    named = {f"{q:g}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
    return {"mean": mean, "quantiles": named}


def _window(grid: tuple[int, ...]) -> tuple[int, int]:
    return math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)


def _scaled(units: ArrayLike) -> Floats:
    """Divides each unit by its largest weight, so that squares stay finite."""
    values = np.asarray(units, dtype=np.float64)
    largest = np.abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True)
    return values / np.where(largest > 0, largest, 1.0)


def _zero_units(values: Floats) -> NDArray[np.bool_]:
    return (values == 0).reshape(len(values), -1).all(axis=1)


def _opposites_table(values: Floats) -> Floats:
    """Correlations with all other non-zero units; infinite elsewhere."""
    table = correlations(values)
    table[:, _zero_units(values)] = np.inf
    np.fill_diagonal(table, np.inf)
    return table


def _over_channels(values: Floats) -> Floats:
    return values.sum(axis=3) if values.ndim == 4 else values


# --- the units of a model ---


@dataclass(frozen=True)
class TokenMixingLayer:
    number: int  # from 1, as in the paper
    name: str  # of the module
    incoming: Floats  # (U, G_H, G_W): input weights of each hidden unit
    outgoing: Floats | None  # (U, G_H, G_W): output weights; None if the outputs are not a grid
    are_tokens: bool = False  # one dense layer without hidden units: unit u is the output token u


@dataclass(frozen=True)
class ModelUnits:
    """Units of a model that can be drawn, and their measures (for the stem in cycles per pixel)."""

    name: str
    architecture: dict[str, Any]
    layers: list[TokenMixingLayer]
    num_layers: int  # including those that cannot be drawn
    stem_weights: Floats | None  # (C, P_h, P_w, channels), the first convolution
    notes: list[str]  # on anything that does not apply to this model

    @cached_property
    def measures(self) -> dict[str, UnitMeasures]:
        """Measures of the incoming weights, by layer ("1", ...) and of the "stem"."""
        return {label: measure_units(weights) for label, weights in self.weights().items()}

    def weights(self) -> dict[str, Floats]:
        found = {str(layer.number): layer.incoming for layer in self.layers}
        return found if self.stem_weights is None else {**found, "stem": self.stem_weights}

    def layer(self, number: int) -> TokenMixingLayer:
        """Returns the layer with this number, from 1."""
        found = {layer.number: layer for layer in self.layers}
        if number in found:
            return found[number]
        what = f"layer {number} cannot be drawn"
        if not 1 <= number <= self.num_layers:
            what = f"no layer {number}: the model has {self.num_layers} token-mixing layers"
        fix = f"Known: {', '.join(map(str, found))}" if found else "".join(self.notes[:1])
        raise UserError(what, where="layers", fix=fix, code="unknown-name")

    def to_json(self) -> dict[str, Any]:
        measured = {label: measures.to_json() for label, measures in self.measures.items()}
        layers = [
            {
                "layer": layer.number,
                "module": layer.name,
                "grid": list(layer.incoming.shape[1:]),
                "incoming": measured[str(layer.number)],
            }
            for layer in self.layers
        ]
        names = {"name": self.name, "architecture": self.architecture}
        return {**names, "layers": layers, "stem": measured.get("stem")}


def model_units(model: ImageClassifier, name: str = "model") -> ModelUnits:
    """Returns the units of all modules named `token_mixing` and of the stem, for any family."""
    named = model.named_modules()
    modules = [pair for pair in named if pair[0].rpartition(".")[2] == "token_mixing"]
    family, grid = type(model).__name__, getattr(model.config, "grid", None)
    layers: list[TokenMixingLayer] = []
    not_drawn: dict[str, list[str]] = {}
    for number, (path, module) in enumerate(modules, start=1):
        weights = _dense_weights(model, number, module)
        is_map = isinstance(module, nn.Linear)
        if weights is None or grid is None or weights[0].shape[1] != math.prod(grid):
            reason = "a unit does not read one value per patch, in all channels alike"
            not_drawn.setdefault(reason, []).append(str(number))
            continue
        incoming, outgoing = weights
        if not np.isfinite(incoming).all():
            not_drawn.setdefault("some weights are not finite", []).append(str(number))
            continue
        is_grid = outgoing.shape == incoming.shape[::-1] and not is_map  # (S, U)
        is_drawn = is_grid and np.isfinite(outgoing).all()
        written = outgoing.T.reshape(-1, *grid) if is_drawn else None
        maps = incoming.reshape(-1, *grid)
        layers.append(TokenMixingLayer(number, path, maps, written, is_map))
    notes = [
        f"layer{'s' * (len(numbers) > 1)} {', '.join(numbers)} not drawn: {reason}"
        for reason, numbers in not_drawn.items()
    ]
    if not modules:
        notes.append(f"figures 5 and 6 do not apply: {family} has no token-mixing MLP")
    stem, units, why = stem_convolution(model), None, ""
    if stem is None:
        why = f"{family} has no convolution that reads the image"
    elif stem.in_channels not in (1, 3) or stem.groups != 1:
        why = f"units of {stem.in_channels} channels, not colours"
    elif not bool(torch.isfinite(stem.weight).all()):
        why = "some weights of the stem are not finite"
    else:
        units = _array(stem.weight).transpose(0, 2, 3, 1)  # (C, P_h, P_w, channels)
    notes += [f"figure 7 does not apply: {why}"] * bool(why)
    return ModelUnits(name, config_to_json(model.config), layers, len(modules), units, notes)


def _dense_weights(
    model: ImageClassifier, number: int, module: nn.Module
) -> tuple[Floats, Floats] | None:
    """Returns both kernels of an MLP over patches that all channels share, or None; of one dense
    layer (ResMLP, gMLP) its kernel twice."""
    config = model.config
    if isinstance(module, nn.Linear):
        return _array(module.weight), _array(module.weight)
    if isinstance(config, MixerConfig) and (
        config.token_groups > 1 or config.tokens[number - 1] != config.num_tokens
    ):
        return None  # reads several channels at once, or the tokens of a pyramid
    first, second = (getattr(getattr(module, f"dense_{at}", None), "weight", None) for at in (0, 1))
    if first is None or second is None or first.dim() != 2:
        return None
    # A gated unit has two input maps; the first is the one that is not the gate.
    return _array(first)[: second.shape[1]], _array(second)


def stem_convolution(model: ImageClassifier) -> nn.Conv2d | None:
    """Returns the first convolution that reads the image: the patch embedding."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return next((one for one in convolutions if one.in_channels == model.config.in_channels), None)


def _array(weight: torch.Tensor) -> Floats:
    return weight.detach().cpu().double().numpy()


def weight_correlations(first: ModelUnits, second: ModelUnits) -> dict[str, float]:
    """Returns the correlation of all incoming weights of two models, by layer and "stem", where
    both have the same shape."""
    theirs, found = second.weights(), {}
    for label, one in first.weights().items():
        other = theirs.get(label)
        if other is not None and one.shape == other.shape:
            norms = np.linalg.norm(one) * np.linalg.norm(other)
            if norms > 0:
                found[label] = float((one * other).sum() / norms)
    return found
