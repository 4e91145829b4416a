"""Numbers of units: what a picture of weights shows, measured, so that models can be compared.

A unit is one hidden unit of an MLP, seen as the picture of its weights over a grid. Nothing here
knows of models. All sums are float64.

    frequency    the spectral centroid of the unit, in cycles per grid step: the mean of |f| over
                 the 2-D discrete Fourier transform of the weights, weighted with its power |F|^2,
                 where f = (f_y, f_x), each on [-1/2, 1/2], and |f| is the Euclidean length. The
                 mean (f = 0) is kept: a unit that averages its whole grid has the frequency 0.
    correlation  of two units: u . v / (|u| |v|), the mean not removed, so that -1 says that one is
                 the inverse of the other, also where both are constant.
    locality     the share of the energy (sum of squares) inside the best of all axis-aligned
                 windows of half the height and half the width, rounded up, that do not wrap around.
                 A constant has `window_share`: 1/4 where both sides are even. A point has 1.

Legend: U units, G_H G_W the grid (height, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

OPPOSITE = -0.8  # a correlation below it makes two units opposites
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# 0.75 is above the highest possible frequency, sqrt(1/2) cycles per step along the diagonal.
FREQUENCY_EDGES = np.linspace(0.0, 0.75, 16)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class UnitMeasures:
    """What the units of one layer are like; NaN for units that are all zero.

    Attributes:
        grid: (G_H, G_W).
        frequency: (U,) spectral centroid in cycles per grid step, 0 to sqrt(1/2).
        locality: (U,) share of the energy in the best quarter-window, (0, 1].
        partner: (U,) the unit with the most negative correlation, from 0; -1 where there is none.
            Two units may have the same one; `pair_opposites` pairs without repeats.
        partner_correlation: (U,) the correlation with it, [-1, 1].
    """

    grid: tuple[int, int]
    frequency: Floats
    locality: Floats
    partner: Integers
    partner_correlation: Floats

    @property
    def is_zero(self) -> NDArray[np.bool_]:
        """(U,) whether all weights of the unit are zero."""
        return np.isnan(self.frequency)

    @property
    def opposite_share(self) -> float | None:
        """Share of the units with a correlation below `OPPOSITE` to some other; None without."""
        known = self.partner_correlation[~np.isnan(self.partner_correlation)]
        return float((known < OPPOSITE).mean()) if len(known) else None

    def to_json(self) -> dict[str, Any]:
        """Returns the distributions over the units as JSON values; None where no unit has one."""
        return {
            "units": len(self.frequency),
            "zero_units": int(self.is_zero.sum()),
            "frequency": {
                **distribution(self.frequency),
                "histogram": frequency_histogram(self.frequency).tolist(),
            },
            "opposite_share": self.opposite_share,
            "partner_correlation": distribution(self.partner_correlation),
            "locality": distribution(self.locality),
            "locality_of_a_constant": window_share(self.grid),
        }


def measure_units(units: ArrayLike) -> UnitMeasures:
    """Returns the frequency, locality and best opposite of every unit.

    Args:
        units: (U, G_H, G_W), or (U, G_H, G_W, channels) of an embedding; finite.

    Raises:
        ValueError: another rank, no unit, or values that are not finite.
    """
    values = _checked(units)
    is_zero = ~values.any(axis=tuple(range(1, values.ndim)))
    partner, correlation = best_opposites(values)
    return UnitMeasures(
        (values.shape[1], values.shape[2]),
        np.where(is_zero, np.nan, spatial_frequency(values)),
        np.where(is_zero, np.nan, locality(values)),
        partner,
        correlation,
    )


def spatial_frequency(units: ArrayLike) -> Floats:
    """Returns the spectral centroid of every unit, (U,) in cycles per grid step.

    Args:
        units: (U, G_H, G_W), or (U, G_H, G_W, channels), whose channels' powers are summed.

    Returns:
        0 for a constant and for a unit that is all zero, at most sqrt(1/2).
    """
    values = _scaled(_checked(units))
    height, width = values.shape[1:3]
    power = np.abs(np.fft.fft2(values, axes=(1, 2))) ** 2
    if power.ndim == 4:
        power = power.sum(axis=3)
    length = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    total = power.sum(axis=(1, 2))
    return (power * length).sum(axis=(1, 2)) / np.where(total > 0, total, 1.0)


def correlations(units: ArrayLike) -> Floats:
    """Returns u . v / (|u| |v|) of all units with all, (U, U); 0 for units that are all zero."""
    values = _scaled(_checked(units)).reshape(len(np.asarray(units)), -1)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    directions = values / np.where(norms > 0, norms, 1.0)
    return np.clip(directions @ directions.T, -1.0, 1.0)


def best_opposites(units: ArrayLike) -> tuple[Integers, Floats]:
    """Returns for each unit the other with the most negative correlation, and the correlation.

    Args:
        units: (U, G_H, G_W) or (U, G_H, G_W, channels).

    Returns:
        Their numbers, (U,) from 0, and correlations, (U,); -1 and NaN for a unit that is all zero
        or alone.
    """
    values = _checked(units)
    is_zero = ~values.reshape(len(values), -1).any(axis=1)
    table = correlations(values)
    table[:, is_zero] = np.inf
    np.fill_diagonal(table, np.inf)
    partner = table.argmin(axis=1)
    found = table[np.arange(len(table)), partner]
    missing = is_zero | np.isinf(found)
    return np.where(missing, -1, partner), np.where(missing, np.nan, found)


def pair_opposites(units: ArrayLike) -> Integers:
    """Returns the order of figure 5: by frequency, each unit followed by its nearest inverse.

    Greedy and without repeats: the unit of the lowest frequency that has no place yet takes the
    next one, and of the others without a place the one with the most negative correlation to it
    takes the place after it. Units that are all zero come last.

    Args:
        units: (U, G_H, G_W).

    Returns:
        The numbers of all units, (U,) from 0: places 0 and 1 are a pair, 2 and 3, and so on; of an
        odd number the last has no partner.
    """
    values = _checked(units)
    is_zero = ~values.reshape(len(values), -1).any(axis=1)
    table = correlations(values)
    np.fill_diagonal(table, np.inf)
    table[:, is_zero] = np.inf
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
    """Returns the correlation of units 0 and 1, of 2 and 3, and so on, (U // 2,).

    NaN where one of them is all zero.

    Args:
        units: (U, G_H, G_W), in an order such as that of `pair_opposites`.
    """
    values = _scaled(_checked(units))
    flat = values.reshape(len(values), -1)[: 2 * (len(values) // 2)]
    first, second = flat[0::2], flat[1::2]
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products = (first * second).sum(axis=1)
    return np.where(norms > 0, np.clip(products / np.where(norms > 0, norms, 1), -1, 1), np.nan)


def locality(units: ArrayLike) -> Floats:
    """Returns the share of every unit's energy in its best quarter-window, (U,).

    Args:
        units: (U, G_H, G_W), or (U, G_H, G_W, channels), whose channels' energies are summed.

    Returns:
        1 for a single point, `window_share` for a constant, 0 for a unit that is all zero.
    """
    energy = _scaled(_checked(units)) ** 2
    if energy.ndim == 4:
        energy = energy.sum(axis=3)
    window = _window(energy.shape[1:3])
    inside = np.lib.stride_tricks.sliding_window_view(energy, window, axis=(1, 2))
    best = inside.sum(axis=(3, 4)).max(axis=(1, 2))
    total = energy.sum(axis=(1, 2))
    return np.minimum(best / np.where(total > 0, total, 1.0), 1.0)


def window_share(grid: tuple[int, int]) -> float:
    """Returns the quarter-window's share of a grid: the locality of a constant."""
    height, width = _window(grid)
    return height * width / (grid[0] * grid[1])


def distribution(values: Floats) -> dict[str, Any]:
    """Returns mean and quantiles of the values that are not NaN; None where there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"mean": None, "quantiles": {f"{q:g}": None for q in QUANTILES}}
    quantiles = np.quantile(known, QUANTILES)
    return {
        "mean": float(known.mean()),
        "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
    }


def frequency_histogram(frequency: Floats) -> Integers:
    """Returns how many frequencies lie between each two of `FREQUENCY_EDGES`."""
    counts, _ = np.histogram(frequency[~np.isnan(frequency)], bins=FREQUENCY_EDGES)
    return counts.astype(np.int64)


def _window(grid: tuple[int, ...]) -> tuple[int, int]:
    return math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)


def _checked(units: ArrayLike) -> Floats:
    values = np.asarray(units, dtype=np.float64)
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise ValueError(f"units are (U, height, width), got the shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("units must be finite")
    return values


def _scaled(values: Floats) -> Floats:
    """Each unit over its largest weight: squares of tiny or huge ones stay in range."""
    largest = np.abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True)
    return values / np.where(largest > 0, largest, 1.0)
