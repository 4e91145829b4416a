"""The measures, on units made by hand whose numbers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allmlp.inspection import units as measures

pytestmark = pytest.mark.numerics

GRIDS = [(8, 8), (4, 12), (7, 5), (1, 9), (1, 1)]


def cosine(grid: tuple[int, int], cycles: tuple[int, int]) -> np.ndarray:
    """A wave with whole numbers of cycles over the grid's height and width."""
    y, x = np.mgrid[: grid[0], : grid[1]]
    return np.cos(2 * np.pi * (cycles[0] * y / grid[0] + cycles[1] * x / grid[1]) + 0.3)


def noise(count: int, grid: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *grid))


@pytest.mark.parametrize("cycles", [(1, 0), (0, 3), (2, 2), (1, 2)])
@pytest.mark.parametrize("grid", [(8, 8), (5, 12)])
def test_a_cosine_has_its_own_frequency(grid, cycles):
    expected = math.hypot(cycles[0] / grid[0], cycles[1] / grid[1])
    found = measures.spatial_frequency(cosine(grid, cycles)[None])
    assert found == pytest.approx([expected], abs=1e-12)
    assert measures.spatial_frequency(-7e-9 * cosine(grid, cycles)[None]) == pytest.approx(found)


def test_frequency_is_weighted_by_power_and_keeps_the_mean():
    mixed = 2 * cosine((8, 8), (0, 1)) + cosine((8, 8), (0, 3))
    assert measures.spatial_frequency(mixed[None])[0] == pytest.approx((4 * 1 + 3) / 5 / 8)
    with_mean = cosine((8, 8), (0, 2)) + math.sqrt(0.5)  # half of the power has frequency 0
    assert measures.spatial_frequency(with_mean[None])[0] == pytest.approx(0.25 / 2)
    board = np.indices((8, 8)).sum(axis=0) % 2 * 2.0 - 1.0
    assert measures.spatial_frequency(board[None])[0] == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("grid", GRIDS)
def test_constants_and_points(grid):
    found = measures.measure_units(np.full((1, *grid), -3.0))
    assert found.frequency == pytest.approx([0.0], abs=1e-12)
    assert found.locality == pytest.approx([measures.window_fraction(grid)])
    assert found.partner.tolist() == [-1]  # it is alone
    assert found.opposite_fraction is None
    point = np.zeros((1, *grid))
    point[0, -1, grid[1] // 2] = -0.1
    assert measures.locality(point) == pytest.approx([1.0])


def test_the_best_window_is_found_and_does_not_wrap():
    assert measures.window_fraction((8, 6)) == 0.25
    assert measures.window_fraction((7, 7)) == pytest.approx(16 / 49)  # half is rounded up
    block = np.zeros((1, 6, 8))
    block[0, 2:5, 3:7] = 1.0
    assert measures.locality(block) == pytest.approx([1.0])
    assert measures.locality(np.roll(block, 3, axis=2)) == pytest.approx([0.5])


def test_channels_are_summed():
    red = np.stack([cosine((4, 4), (0, 1)), np.zeros((4, 4)), np.zeros((4, 4))], axis=-1)
    blue = np.roll(red, 2, axis=-1)
    assert measures.spatial_frequency([red, red + blue]) == pytest.approx([0.25, 0.25])
    assert measures.locality([red]) == pytest.approx(measures.locality(red[..., :1][None]))


def test_a_unit_and_its_negative_are_a_pair():
    units = np.concatenate([noise(5, (4, 6)), -2 * noise(5, (4, 6))])
    found = measures.measure_units(units)
    assert found.partner.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert found.partner_correlation == pytest.approx(-np.ones(10))
    assert found.opposite_fraction == 1.0
    order = measures.pair_opposites(units)
    assert all(abs(first - second) == 5 for first, second in order.reshape(-1, 2))
    constants = [np.ones((4, 4)), -np.ones((4, 4)), cosine((4, 4), (1, 0))]
    found = measures.measure_units(constants)
    assert (found.partner[:2].tolist(), found.opposite_fraction) == ([1, 0], 2 / 3)


def test_pairs_are_ordered_by_frequency_and_a_partner_is_used_once():
    waves = [cosine((8, 8), (0, cycles)) for cycles in (3, 1, 2)]
    order = measures.pair_opposites([*waves, *(-wave for wave in waves)])
    assert order.tolist() == [1, 4, 2, 5, 0, 3]
    low, high = np.ones((4, 4)), np.ones((4, 4))
    high[0, 0] = 0.5  # both want -low: the lower frequency has it
    order = measures.pair_opposites([high, low, -low, cosine((4, 4), (2, 2))])
    assert order.tolist() == [1, 2, 0, 3]


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 13),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    zeros=st.integers(0, 4),
    seed=st.integers(0, 9),
)
def test_every_unit_appears_once(count, height, width, zeros, seed):
    values = noise(count, (height, width), seed)
    values[:zeros] = 0
    assert sorted(measures.pair_opposites(values)) == list(range(count))
    found = measures.measure_units(values)
    known = ~found.is_zero
    assert known.sum() == max(count - zeros, 0)
    assert (found.locality[known] <= 1).all()
    assert (found.frequency[known] <= math.sqrt(0.5)).all()
    assert (found.partner != np.arange(count)).all()


def test_zero_units_enter_no_other_number():
    values = np.concatenate([np.zeros((2, 4, 4)), noise(3, (4, 4))])
    found = measures.measure_units(values)
    assert found.is_zero.tolist() == [True, True, False, False, False]
    assert not np.isin(found.partner[2:], [0, 1]).any()
    assert measures.pair_opposites(values)[-1] in (0, 1)
    values = found.to_json()
    assert (values["units"], values["zero_units"]) == (5, 2)
    assert sum(values["frequency"]["histogram"]) == 3
    assert values["frequency"]["mean"] == pytest.approx(np.nanmean(found.frequency))
    assert values["locality"]["quantiles"]["0.5"] == pytest.approx(np.nanmedian(found.locality))
    nothing = measures.measure_units(np.zeros((2, 4, 4))).to_json()
    assert (nothing["opposite_share"], nothing["frequency"]["mean"]) == (None, None)


def test_extreme_weights_and_float32():
    plain = measures.measure_units(noise(3, (4, 4)))
    for scale in (1e-200, 1e200):
        found = measures.measure_units(scale * noise(3, (4, 4)))
        assert found.frequency == pytest.approx(plain.frequency)
        assert found.partner_correlation == pytest.approx(plain.partner_correlation)
    assert measures.correlations(noise(4, (6, 6)).astype(np.float32)).dtype == np.float64
