"""The convolutional network to compare with: its cost, shapes, saving, and that it can learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import allmlp as am
from allmlp.models.small_resnet import SmallResNetConfig

pytestmark = pytest.mark.numerics


def build(
    size: int | tuple[int, int] = 12, classes: int = 3, **settings: int
) -> am.ImageClassifier:
    torch.manual_seed(0)
    return am.create_model("small_resnet", size, classes, **{"width": 8, **settings})


@pytest.mark.parametrize(
    ("size", "settings"), [(12, {}), ((9, 14), {"num_blocks": 1}), (8, {"num_stages": 1})]
)
def test_operations_by_the_closed_formula(size, settings):
    model = build(size, **settings)
    height, width = model.config.image_size
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(1, 3, height, width))
    assert logits.shape == (1, 3)
    assert counter.get_total_flops() == model.config.flops


def test_it_is_as_large_as_it_says():
    model = am.create_model("small_resnet", 32, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 696_234
    assert model.config.summary() == "small ResNet, 3 stages of 2 blocks, 32 channels"
    assert "small_resnet" not in am.list_models()


def test_it_learns_and_its_head_begins_at_zero():
    model = build()
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(24) % 3
    images = torch.randn(24, 3, 12, 12, generator=random) * 0.1
    images[torch.arange(24), labels] += 1.0  # a class is a colour
    assert not model(images).any()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert (model(images).argmax(dim=1) == labels).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 12}, "multiple of 8"),
        ({"num_stages": 0}, "at least 1"),
        ({"image_size": 3}, "at least 4 pixels"),
        ({"num_classes": -1}, "at least 0"),
    ],
)
def test_values_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        SmallResNetConfig(**settings)
