"""Operations and lengths by hand, and the memory of a step as autograd is seen to take it."""

from __future__ import annotations

import pytest
import torch

import allmlp as am
from allmlp.runtime.device import ComputePolicy
from allmlp.training.config import SGD, AdamW, Muon
from allmlp.training.cost import (
    duration,
    num_images_seen,
    operations,
    power,
    saved_bytes,
    state_copies,
)
from conftest import tiny_model
from staged_models import small_cycle, small_permutator


def test_operations_and_images():
    assert operations(636, 10) == operations(636, 10, AdamW()) == 3 * 636 * 10
    assert operations(636, 10, AdamW(sam_rho=0.1)) == 6 * 636 * 10
    assert operations(636, 10, AdamW(sam_rho=0.1, sam_start=0.75)) == round(3.75 * 6360)
    assert power(operations(25_200_000_000, 144_000)) == "1.1e16"
    assert num_images_seen(am.recipe("digits"), 1293) == 100 * 1293
    assert num_images_seen(am.recipe("finetune_pets"), 3680) == 500 * 512


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min"),
        (125, "2 min 5 s"),
        (3599.7, "1 h"),
        (12_000, "3 h 20 min"),
        (90_000, "1 day 1 h"),
        (4.5 * 86_400, "4 days 12 h"),
        (100 * 86_400 + 3600, "100 days"),
    ],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


def test_copies_of_the_weights():
    """The weights, their gradient, the moments, the average, what SAM puts back."""
    optimizers = [AdamW(), Muon(ema_decay=0.9), SGD(), SGD(momentum=0.0, sam_rho=0.1)]
    assert [state_copies(optimizer) for optimizer in optimizers] == [4, 5, 3, 3]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [lambda: tiny_model(10, 32), small_cycle, small_permutator])
def test_the_bytes_of_an_image(make, precision: str):
    """One image more costs a batch so many bytes more; no random number is drawn."""
    model = make().train()
    compute = ComputePolicy(torch.device("cpu"), precision, False, "")
    image = torch.zeros(1, 3, *model.config.image_size)
    before = torch.get_rng_state()
    found = saved_bytes(model, image, compute)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), compute.autocast():
        _ = model(image.repeat(8, 1, 1, 1))
    of_eight = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert of_eight / 8 * 0.5 < found < of_eight / 8 * 2.5
