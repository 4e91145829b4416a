"""The measures, on units made by hand whose numbers are known; which weights are units."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import allmlp as am
from allmlp.inspection import units as measures
from allmlp.inspection.units import model_units
from allmlp.weights.load import resize_model
from conftest import tiny_model

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
    with_mean = cosine((8, 8), (0, 2)) + math.sqrt(0.5)  # half of the power has frequency 0
    board = np.indices((8, 8)).sum(axis=0) % 2 * 2.0 - 1.0
    expected = [(4 * 1 + 3) / 5 / 8, 0.25 / 2, math.sqrt(0.5)]
    assert measures.spatial_frequency([mixed, with_mean, board]) == pytest.approx(expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_constants_and_points(grid):
    found = measures.measure_units(np.full((1, *grid), -3.0))
    assert found.frequency == pytest.approx([0.0], abs=1e-12)
    assert found.locality == pytest.approx([measures.window_fraction(grid)])
    assert found.partner.tolist() == [-1]  # it is alone
    assert found.to_json()["opposite_share"] is None
    point = np.zeros((1, *grid))
    point[0, -1, grid[1] // 2] = -0.1
    assert measures.locality(point) == pytest.approx([1.0])


def test_a_unit_and_its_negative_are_a_pair():
    units = np.concatenate([noise(5, (4, 6)), -2 * noise(5, (4, 6))])
    found = measures.measure_units(units)
    assert found.partner.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert found.partner_correlation == pytest.approx(-np.ones(10))
    assert found.to_json()["opposite_share"] == 1.0
    order = measures.pair_opposites(units)
    assert all(abs(first - second) == 5 for first, second in order.reshape(-1, 2))
    constants = [np.ones((4, 4)), -np.ones((4, 4)), cosine((4, 4), (1, 0))]
    found = measures.measure_units(constants)
    assert (found.partner[:2].tolist(), found.to_json()["opposite_share"]) == ([1, 0], 2 / 3)


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
    assert values["frequency"]["mean"] == pytest.approx(np.nanmean(found.frequency))
    assert values["locality"]["quantiles"]["0.5"] == pytest.approx(np.nanmedian(found.locality))
    nothing = measures.measure_units(np.zeros((2, 4, 4))).to_json()
    assert (nothing["opposite_share"], nothing["frequency"]["mean"]) == (None, None)


def test_units_are_row_major_over_the_grid():
    model = tiny_model(image_size=(8, 12))
    first = model.blocks[0].token_mixing
    with torch.no_grad():
        first.dense_0.weight.zero_()
        first.dense_0.weight[5, 4] = 2.0  # the patch in row 1, column 1 of a 2x3 grid
        first.dense_1.weight.zero_()
        first.dense_1.weight[2, 5] = -3.0  # row 0, column 2
    found = model_units(model)
    assert found.notes == []
    assert [layer.name for layer in found.layers] == [f"blocks.{i}.token_mixing" for i in (0, 1)]
    layer = found.layer(1)
    assert (layer.incoming.shape, layer.incoming.dtype) == ((8, 2, 3), np.float64)
    assert np.argwhere(layer.incoming).tolist() == [[5, 1, 1]]
    assert np.argwhere(layer.outgoing).tolist() == [[5, 0, 2]]
    assert found.stem_weights.shape == (16, 4, 4, 3)
    assert found.stem_weights[3, 1, 2, 0] == pytest.approx(model.stem.weight[3, 0, 1, 2].item())


def test_a_model_grown_by_blocks():
    """Every unit of the small model is there once per tile, and reads only its own."""
    model = tiny_model(image_size=8)
    tensors = dict(model.state_dict())
    config, _ = resize_model(tensors, model.config, (16, 16), "block-diagonal")
    grown = am.MlpMixer(config)
    grown.load_state_dict(tensors)
    measured = model_units(grown)
    incoming = measured.layer(1).incoming
    assert incoming.shape == (32, 4, 4)
    assert measured.measures["1"].locality == pytest.approx(np.ones(32))
    small = model_units(model).layer(1).incoming
    tiles = [incoming[:, y : y + 2, x : x + 2] for y in (0, 2) for x in (0, 2)]
    for tile in tiles:
        own = tile[np.abs(tile).any(axis=(1, 2))]
        assert sorted(map(tuple, own.reshape(8, 4))) == sorted(map(tuple, small.reshape(8, 4)))


GROUPED = {"token_mixing": "grouped", "token_groups": 4, "pyramid": ((0, 4),), "image_size": 16}


@pytest.mark.parametrize(
    ("changes", "drawn", "note"),
    [
        ({"token_mixing": "untied"}, [], "layers 1, 2 not drawn"),
        ({"token_mixing": "views", "token_groups": 2}, [], "layers 1, 2 not drawn"),
        ({"pyramid": ((0, 4),), "image_size": 16}, [1], "layer 2 not drawn"),
        (GROUPED, [], "layers 1, 2 not drawn"),  # groups x tokens is the number of patches
    ],
)
def test_variants_of_token_mixing(changes, drawn, note):
    found = model_units(tiny_model(**changes))
    assert [layer.number for layer in found.layers] == drawn
    assert all(layer.outgoing is None for layer in found.layers)
    (text,) = found.notes
    with pytest.raises(am.UserError, match=r"layer 2"):
        found.layer(2)
    assert re.match(note, text)
