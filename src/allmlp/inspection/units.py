"""Measures of hidden units, each seen as its weights over a grid; all sums are float64.

Legend: U units, G_H G_W the grid (height, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

OPPOSITE = -0.8  # two units with a lower correlation are opposites
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# 0.75 is above the highest possible frequency, sqrt(1/2) cycles per step along the diagonal.
FREQUENCY_EDGES = np.linspace(0.0, 0.75, 16)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class UnitMeasures:
    """The measures of the units of one layer, (U,) each; NaN for units that are all zero."""

    grid: tuple[int, int]
    frequency: Floats
    locality: Floats
    partner: Integers  # the unit with the most negative correlation, from 0; -1 without any
    partner_correlation: Floats

    @property
    def is_zero(self) -> NDArray[np.bool_]:
        return np.isnan(self.frequency)

    @property
    def opposite_fraction(self) -> float | None:
        """Fraction of the units whose correlation with another is below `OPPOSITE`."""
        known = self.partner_correlation[~np.isnan(self.partner_correlation)]
        return float((known < OPPOSITE).mean()) if len(known) else None

    def to_json(self) -> dict[str, Any]:
        """Returns the distributions over the units; None where no unit has a value."""
        histogram, _ = np.histogram(self.frequency[~self.is_zero], bins=FREQUENCY_EDGES)
        return {
            "units": len(self.frequency),
            "zero_units": int(self.is_zero.sum()),
            "frequency": {**_distribution(self.frequency), "histogram": histogram.tolist()},
            "opposite_share": self.opposite_fraction,
            "partner_correlation": _distribution(self.partner_correlation),
            "locality": _distribution(self.locality),
            "locality_of_a_constant": window_fraction(self.grid),
        }


def measure_units(units: ArrayLike) -> UnitMeasures:
    """Returns the measures of units (U, G_H, G_W) or (U, G_H, G_W, channels)."""
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
    """Returns the spectral centroid of every unit in cycles per grid step, 0 to sqrt(1/2).

    The mean of |f| over the 2-D discrete Fourier transform, weighted by its power |F|^2, where
    f = (f_y, f_x), each on [-1/2, 1/2]. The mean (f = 0) is kept: a constant has frequency 0.
    """
    values = _scaled(units)
    height, width = values.shape[1:3]
    power = _over_channels(np.abs(np.fft.fft2(values, axes=(1, 2))) ** 2)
    length = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    total = power.sum(axis=(1, 2))
    return (power * length).sum(axis=(1, 2)) / np.where(total > 0, total, 1.0)


def locality(units: ArrayLike) -> Floats:
    """Returns the fraction of every unit's energy in its best window of half the grid's sides.

    1 for a point; `window_fraction` for a constant, 1/4 where both sides are even.
    """
    energy = _over_channels(_scaled(units) ** 2)
    window = _window(energy.shape[1:3])
    inside = np.lib.stride_tricks.sliding_window_view(energy, window, axis=(1, 2))
    best = inside.sum(axis=(3, 4)).max(axis=(1, 2))
    total = energy.sum(axis=(1, 2))
    return np.minimum(best / np.where(total > 0, total, 1.0), 1.0)


def correlations(units: ArrayLike) -> Floats:
    """Returns u . v / (|u| |v|) of all units with all, (U, U); 0 for units that are all zero.

    The mean is not removed, so that -1 means an inverse also where both are constant.
    """
    values = _scaled(units)
    values = values.reshape(len(values), -1)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    directions = values / np.where(norms > 0, norms, 1.0)
    return np.clip(directions @ directions.T, -1.0, 1.0)


def pair_opposites(units: ArrayLike) -> Integers:
    """Returns the order of figure 5: by frequency, each unit followed by its nearest inverse.

    Greedy and without repeats: the unplaced unit of the lowest frequency comes next, followed by
    the unplaced unit with the most negative correlation to it. Units that are all zero come last.
    Of an odd number the last has no partner.
    """
    values = _scaled(units)
    is_zero, table = _zero_units(values), _opposites_table(values)
    order: list[int] = []
    is_placed = np.zeros(len(values), dtype=bool)
    for first in np.lexsort((spatial_frequency(values), is_zero)):
        if is_placed[first]:
            continue
        is_placed[first] = True
        order.append(int(first))
        if is_placed.all():
            break
        second = int(np.where(is_placed, np.inf, table[first]).argmin())
        if is_placed[second]:  # only zero units are left: any of them
            second = int(np.flatnonzero(~is_placed)[0])
        is_placed[second] = True
        order.append(second)
    return np.array(order, dtype=np.int64)


def pair_correlations(units: ArrayLike) -> Floats:
    """Returns the correlation of units 0 and 1, 2 and 3, ..., (U // 2,); NaN with a zero unit."""
    values = _scaled(units)
    flat = values.reshape(len(values), -1)[: len(values) // 2 * 2]
    first, second = flat[0::2], flat[1::2]
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products = (first * second).sum(axis=1)
    return np.where(norms > 0, np.clip(products / np.where(norms > 0, norms, 1), -1, 1), np.nan)


def window_fraction(grid: tuple[int, int]) -> float:
    """Returns the quarter-window's fraction of a grid: the locality of a constant."""
    height, width = _window(grid)
    return height * width / (grid[0] * grid[1])


def _distribution(values: Floats) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    if not len(known):
        return {"mean": None, "quantiles": {f"{q:g}": None for q in QUANTILES}}
    quantiles = np.quantile(known, QUANTILES)
    return {
        "mean": float(known.mean()),
        "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
    }


def _window(grid: tuple[int, ...]) -> tuple[int, int]:
    return math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)


def _scaled(units: ArrayLike) -> Floats:
    """Each unit divided by its largest weight, so that squares of tiny or huge ones stay finite."""
    values = np.asarray(units, dtype=np.float64)
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise ValueError(f"units are (U, height, width), got the shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("units must be finite")
    largest = np.abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True)
    return values / np.where(largest > 0, largest, 1.0)


def _zero_units(values: Floats) -> NDArray[np.bool_]:
    return (values == 0).reshape(len(values), -1).all(axis=1)


def _opposites_table(values: Floats) -> Floats:
    """Correlations with all other units that are not zero; infinite elsewhere."""
    table = correlations(values)
    table[:, _zero_units(values)] = np.inf
    np.fill_diagonal(table, np.inf)
    return table


def _over_channels(values: Floats) -> Floats:
    return values.sum(axis=3) if values.ndim == 4 else values
