"""What a model costs: the closed formula against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mlp_mixer as mm
from conftest import TINY
from mlp_mixer.evaluation.throughput import count_parameters, flops_text


@pytest.mark.parametrize(
    ("name", "size", "changes"),
    [
        ("mixer_s16", 224, {}),
        ("mixer_b32", (64, 96), {"num_classes": 0}),
        ("mixer_h14", 28, {"in_channels": 1}),
        ("mixer_s16", 8, TINY),
    ],
)
def test_flops_equal_torchs_count(name, size, changes):
    with torch.device("meta"):
        model = mm.create_model(name, size, **changes).eval()
        images = torch.empty(1, model.config.in_channels, *model.config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert model.config.flops == counter.get_total_flops()


def test_parameters_are_counted():
    model = torch.nn.Linear(3, 5)
    assert count_parameters(model) == 20


def test_flops_in_words():
    assert flops_text(25_203_000_000) == "25.2 GFLOPs"
    assert flops_text(2_770_000) == "2.77 MFLOPs"
