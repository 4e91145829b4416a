"""The convolutional network to compare with; `test_every_model` has what all networks must do."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import allmlp as am
from allmlp.models.small_resnet import SmallResNetConfig


def test_its_size_and_its_name():
    model = am.create_model("small_resnet", 32, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 696_234
    assert model.config.summary() == "small ResNet, 3 stages of 2 blocks, 32 channels"
    assert "small_resnet" not in am.list_models()


@pytest.mark.numerics
def test_operations_of_a_grid_that_does_not_halve():
    model = am.create_model("small_resnet", (9, 14), 3, width=8, num_blocks=1)
    images = torch.zeros(1, 3, 9, 14)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert counter.get_total_flops() == model.config.flops


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"width": 12}, "multiple of 8"), ({"image_size": 3}, "at least 4 pixels")],
)
def test_values_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        SmallResNetConfig(**settings)
