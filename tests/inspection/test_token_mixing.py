"""Which weights of a model are its units, and what the notes say of other models."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

import allmlp as am
from allmlp.inspection.units import model_units, weight_correlations
from allmlp.weights.load import resize_model
from conftest import TINY, tiny_model

pytestmark = pytest.mark.numerics


class OtherModel(am.ImageClassifier):
    """A model with a stem and nothing else in common with a Mixer."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.config = am.MixerConfig(image_size=8, in_channels=channels, **TINY)
        self.stem = nn.Conv2d(channels, 6, kernel_size=(3, 5), stride=2)


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
    assert layer.outgoing is not None
    assert np.argwhere(layer.outgoing).tolist() == [[5, 0, 2]]
    assert found.stem_weights is not None
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
    assert measured.incoming[0].locality == pytest.approx(np.ones(32))
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
    assert found.stem_weights is not None
    (text,) = found.notes
    with pytest.raises(am.UserError, match=r"layer 2"):
        found.layer(2)
    assert re.match(note, text)


@pytest.mark.parametrize(
    ("name", "size", "stem"),
    [("cycle_mlp_b1", 64, (64, 7, 7, 3)), ("vip_s14", 56, (384, 14, 14, 3))],
)
def test_the_other_families(name, size, stem):
    found = model_units(am.create_model(name, size, 3))
    assert found.layers == []
    assert len(found.notes) == 1
    assert "figures 5 and 6" in found.notes[0]
    assert found.stem_weights is not None
    assert found.stem_weights.shape == stem


def test_models_of_other_kinds():
    found = model_units(OtherModel())
    assert found.stem_weights is not None
    assert found.stem_weights.shape == (6, 3, 5, 3)
    with pytest.raises(am.UserError, match="no layer 1: the model has 0"):
        found.layer(1)
    found = model_units(OtherModel(channels=4))
    assert found.stem_weights is None
    assert "4 channels" in found.notes[-1]
    model = OtherModel()
    model.stem = nn.Identity()
    assert "no convolution" in model_units(model).notes[-1]
    model = tiny_model()
    model.blocks[1].token_mixing = nn.Identity()
    found = model_units(model)
    assert [layer.number for layer in found.layers] == [1]
    assert found.notes[0].startswith("layer 2 ")


def test_weights_that_are_not_finite():
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].token_mixing.dense_0.weight[0, 0] = float("nan")
        model.blocks[1].token_mixing.dense_1.weight[0, 0] = float("inf")
        model.stem.weight[0] = float("inf")
    found = model_units(model)
    assert "layer 1 " in found.notes[0]
    assert "not finite" in found.notes[0]
    assert found.layer(2).outgoing is None
    assert found.stem_weights is None


def test_correlation_of_two_models():
    model = tiny_model()
    one, other = model_units(model), model_units(am.random_weights(model, 1))
    assert weight_correlations(one, one) == pytest.approx({"1": 1, "2": 1, "stem": 1})
    assert abs(weight_correlations(one, other)["stem"]) < 0.3
    larger = model_units(am.random_weights(tiny_model(image_size=16)))
    assert list(weight_correlations(one, larger)) == ["stem"]
