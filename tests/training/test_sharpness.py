"""Sharpness-aware minimisation against a plain computation, and that the weights come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from allmlp.training.settings import OptimizerSettings
from allmlp.training.sharpness import sharpest_point, sharpness_at
from conftest import tiny_model

pytestmark = pytest.mark.numerics


def logistic_gradient(w: np.ndarray, b: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the mean log-loss, written out: the average of (p - y) times the input, b last."""
    error = 1 / (1 + np.exp(-(x @ w + b))) - y
    return np.append(x.T @ error, error.sum()) / len(y)


def test_the_second_gradient_is_that_at_the_sharpest_point():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(20, 3)), random.integers(0, 2, size=20).astype(float)
    w, b, radius = random.normal(size=3), 0.3, 0.7
    first = logistic_gradient(w, b, x, y)
    point = np.append(w, b) + radius * first / np.linalg.norm(first)
    second = logistic_gradient(point[:3], point[3], x, y)

    weight = nn.Parameter(torch.from_numpy(w.copy()))
    bias = nn.Parameter(torch.tensor(b, dtype=torch.float64))
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)

    def backward() -> np.ndarray:
        weight.grad = bias.grad = None
        logits = inputs @ weight + bias
        nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
        assert weight.grad is not None
        assert bias.grad is not None
        return np.append(weight.grad.numpy(), bias.grad.numpy())

    np.testing.assert_allclose(backward(), first, rtol=1e-12)
    with sharpest_point(iter([weight, bias]), radius):
        moved = np.append(weight.detach().numpy(), bias.detach().numpy())
        np.testing.assert_allclose(moved, point, rtol=1e-12)
        found = backward()
    np.testing.assert_allclose(found, second, rtol=1e-12)
    assert np.linalg.norm(second - first) > 1e-3  # it makes a difference here
    assert weight.detach().numpy().tobytes() == w.tobytes()
    assert bias.item() == b
    assert weight.grad is not None
    assert weight.grad.numpy().tobytes() == found[:3].tobytes()  # what the optimiser then uses


def test_a_quadratic_by_hand():
    """w^2 + 10 v^2 at (3, 0.4): the gradient is (6, 8), of length 10."""
    w, v = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (3.0, 0.4))
    (w**2 + 10 * v**2).backward()
    with sharpest_point([w, v], 0.5):
        assert (w.item(), v.item()) == (pytest.approx(3.3), pytest.approx(0.8))


def bits(model: nn.Module) -> list[list[int]]:
    return [each.detach().view(torch.int32).ravel().tolist() for each in model.parameters()]


@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_come_back_bit_for_bit(fails: bool):
    """Also values that adding and subtracting would not bring back: -0, tiny ones, huge ones."""
    model = tiny_model()
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([-0.0, 1e-30, 1e30, 1.0, 0.1, 3e-39, -7.0]))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = bits(model)
    with pytest.raises(KeyError) if fails else torch.enable_grad():  # noqa: SIM117
        with sharpest_point(model.parameters(), 0.1):
            assert all(now != then for now, then in zip(bits(model), before, strict=True))
            if fails:
                raise KeyError
    assert bits(model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_hidden(value: float):
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    weight.grad = torch.tensor([value, 1.0])
    with sharpest_point([weight], 0.1):
        assert not weight.isfinite().all()
    assert weight.tolist() == [1.0, 2.0]


def test_without_a_gradient_nothing_moves():
    flat, idle = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
    flat.grad = torch.zeros(2)
    with sharpest_point([flat, idle], 0.1):
        assert (flat.tolist(), idle.tolist()) == ([1.0, 2.0], [3.0])
    flat.grad = torch.tensor([0.0, 2.0])
    with sharpest_point([flat, idle], 0.25):
        assert (flat.tolist(), idle.tolist()) == ([1.0, 2.25], [3.0])
    assert (flat.tolist(), idle.tolist()) == ([1.0, 2.0], [3.0])


def test_where_sharpness_begins():
    assert [sharpness_at(OptimizerSettings(), step, 10) for step in (0, 9)] == [0.0, 0.0]
    always = OptimizerSettings(sharpness=0.2)
    assert [sharpness_at(always, step, 10) for step in (0, 9)] == [0.2, 0.2]
    late = OptimizerSettings(sharpness=0.2, sharpness_from=0.9)
    found = [sharpness_at(late, step, 100) for step in (0, 89, 90, 99)]
    assert found == [0.0, 0.0, 0.2, 0.2]
