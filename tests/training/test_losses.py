"""The two losses: values by hand, gradients, and batches in parts."""

from __future__ import annotations

import math

import pytest
import torch

from allmlp.training.losses import loss_function, one_hot

pytestmark = pytest.mark.numerics


def test_losses_by_hand():
    logits, targets = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.8, 0.2]])
    log_sum = math.log(math.exp(2) + math.exp(-1))
    softmax = log_sum - 0.8 * 2 + 0.2 * 1
    assert loss_function(logits, targets, "softmax").item() == pytest.approx(softmax)
    smoothed = log_sum - (0.9 * 0.8 + 0.05) * 2 + (0.9 * 0.2 + 0.05) * 1
    assert loss_function(logits, targets, "softmax", 0.1).item() == pytest.approx(smoothed)

    def log_sigmoid(x: float) -> float:
        return -math.log(1 + math.exp(-x))

    pairs = zip((2.0, -1.0), (0.8, 0.2), strict=True)
    each = [-t * log_sigmoid(x) - (1 - t) * log_sigmoid(-x) for x, t in pairs]
    assert loss_function(logits, targets, "sigmoid").item() == pytest.approx(sum(each))


def drawn(num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and soft targets of five classes, in float64."""
    random = torch.Generator().manual_seed(0)
    logits, other = torch.randn((2, num_images, 5), generator=random, dtype=torch.float64)
    return logits.requires_grad_(), torch.softmax(2 * other, dim=1)


@pytest.mark.parametrize(("kind", "smoothing"), [("softmax", 0), ("softmax", 0.1), ("sigmoid", 0)])
def test_gradients_are_those_of_small_differences(kind: str, smoothing: float):
    logits, targets = drawn(4)
    assert torch.autograd.gradcheck(
        lambda values: loss_function(values, targets, kind, smoothing), (logits,)
    )
    loss_function(logits, targets, kind, smoothing).backward()
    assert logits.grad is not None
    if kind == "sigmoid":
        expected = (torch.sigmoid(logits) - targets) / 4
    else:
        expected = (torch.softmax(logits, 1) - (1 - smoothing) * targets - smoothing / 5) / 4
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_parts_of_a_batch_add_up_by_their_shares(kind: str):
    logits, targets = drawn(7)
    whole = loss_function(logits, targets, kind)
    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    each = [loss_function(logits[p], targets[p], kind) * len(targets[p]) / 7 for p in parts]
    torch.testing.assert_close(sum(each), whole)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (sum(each), whole)]
    torch.testing.assert_close(*gradients)


def test_one_hot():
    found = one_hot(torch.tensor([2, 0]), 3)
    assert found.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert found.dtype == torch.float32
