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
    """A wave of so many whole cycles over the grid's height and width."""
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


def test_the_frequency_of_two_waves_is_weighted_with_their_power():
    mixed = 2 * cosine((8, 8), (0, 1)) + cosine((8, 8), (0, 3))
    assert measures.spatial_frequency(mixed[None])[0] == pytest.approx((4 * 1 + 3) / 5 / 8)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_constant(grid):
    found = measures.measure_units(np.full((1, *grid), -3.0))
    assert found.frequency == pytest.approx([0.0], abs=1e-12)
    assert found.locality == pytest.approx([measures.window_share(grid)])
    assert found.partner.tolist() == [-1]  # it is alone
    assert found.opposite_share is None


def test_the_mean_is_kept():
    wave = cosine((8, 8), (0, 2))
    with_mean = measures.spatial_frequency((wave + math.sqrt(0.5))[None])[0]
    assert with_mean == pytest.approx(0.25 / 2)  # half of the power has the frequency 0


def test_a_chessboard_has_the_highest_frequency():
    board = np.indices((8, 8)).sum(axis=0) % 2 * 2.0 - 1.0
    assert measures.spatial_frequency(board[None])[0] == pytest.approx(math.sqrt(0.5))
    assert measures.FREQUENCY_EDGES[-1] > math.sqrt(0.5)


def test_colours_are_summed():
    red = np.stack([cosine((4, 4), (0, 1)), np.zeros((4, 4)), np.zeros((4, 4))], axis=-1)
    blue = np.roll(red, 2, axis=-1)
    assert measures.spatial_frequency([red, red + blue]) == pytest.approx([0.25, 0.25])
    assert measures.locality([red]) == pytest.approx(measures.locality(red[..., :1][None]))


def test_a_unit_and_its_negative_are_a_pair():
    base = noise(5, (4, 6))
    found = measures.measure_units(np.concatenate([base, -2 * base]))
    assert found.partner.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert found.partner_correlation == pytest.approx(-np.ones(10))
    assert found.opposite_share == 1.0
    order = measures.pair_opposites(np.concatenate([base, -2 * base]))
    assert all(abs(first - second) == 5 for first, second in order.reshape(-1, 2))
    pairs = measures.pair_correlations(np.concatenate([base, -2 * base])[order])
    assert pairs == pytest.approx(-np.ones(5))


def test_constants_are_opposites_too():
    found = measures.measure_units([np.ones((4, 4)), -np.ones((4, 4)), cosine((4, 4), (1, 0))])
    assert found.partner[:2].tolist() == [1, 0]
    assert found.opposite_share == pytest.approx(2 / 3)


def test_the_order_is_by_frequency():
    waves = [cosine((8, 8), (0, cycles)) for cycles in (3, 1, 2)]
    order = measures.pair_opposites([*waves, *(-wave for wave in waves)])
    assert order[::2].tolist() == [1, 2, 0]
    assert order[1::2].tolist() == [4, 5, 3]


def test_a_partner_is_used_once():
    """Two units want the same opposite: the one of the lower frequency has it."""
    low, high = np.ones((4, 4)), np.ones((4, 4))
    high[0, 0] = 0.5
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


def test_zero_units_are_counted_apart():
    values = np.concatenate([np.zeros((2, 4, 4)), noise(3, (4, 4))])
    found = measures.measure_units(values)
    assert found.is_zero.tolist() == [True, True, False, False, False]
    assert not np.isin(found.partner[2:], [0, 1]).any()
    assert measures.pair_opposites(values)[-1] in (0, 1)
    said = found.to_json()
    assert (said["units"], said["zero_units"]) == (5, 2)
    assert sum(said["frequency"]["histogram"]) == 3
    nothing = measures.measure_units(np.zeros((2, 4, 4))).to_json()
    assert nothing["opposite_share"] is None
    assert nothing["frequency"]["mean"] is None


@pytest.mark.parametrize("grid", GRIDS)
def test_a_point_is_local(grid):
    point = np.zeros((1, *grid))
    point[0, -1, grid[1] // 2] = -0.1
    assert measures.locality(point) == pytest.approx([1.0])


def test_locality_of_a_constant_is_a_quarter():
    assert measures.locality(np.ones((1, 8, 6))) == pytest.approx([0.25])
    assert measures.window_share((7, 7)) == pytest.approx(16 / 49)  # half is rounded up


def test_the_best_window_is_found_and_does_not_wrap():
    block = np.zeros((1, 6, 8))
    block[0, 2:5, 3:7] = 1.0
    assert measures.locality(block) == pytest.approx([1.0])
    assert measures.locality(np.roll(block, 3, axis=2)) == pytest.approx([0.5])


def test_extreme_weights():
    tiny, huge = 1e-200 * noise(3, (4, 4)), 1e200 * noise(3, (4, 4))
    for values in (tiny, huge):
        found, plain = measures.measure_units(values), measures.measure_units(noise(3, (4, 4)))
        assert found.frequency == pytest.approx(plain.frequency)
        assert found.partner_correlation == pytest.approx(plain.partner_correlation)


def test_float32_is_measured_in_float64():
    values = noise(4, (6, 6)).astype(np.float32)
    assert measures.correlations(values).dtype == np.float64
    assert np.diag(measures.correlations(values)) == pytest.approx(np.ones(4), abs=1e-15)


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4)), np.zeros((0, 4, 4)), np.full((1, 2, 2), np.nan)]
)
def test_what_is_no_unit(wrong):
    with pytest.raises(ValueError, match="units"):
        measures.measure_units(wrong)


def test_quantiles_and_histogram():
    values = np.array([0.04, 0.06, 0.06, 0.72, np.nan])
    said = measures.distribution(values)
    assert said["mean"] == pytest.approx(0.22)
    assert said["quantiles"]["0.5"] == pytest.approx(0.06)
    assert measures.frequency_histogram(values).tolist() == [1, 2, *[0] * 12, 1]
