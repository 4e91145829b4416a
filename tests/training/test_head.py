"""The linear probe's frozen parameters and the bias that a new head begins with."""

from __future__ import annotations

import pytest
import torch

from allmlp.errors import UserError
from allmlp.training.head import freeze_all_but_head, start_head_bias
from conftest import tiny_model

pytestmark = pytest.mark.numerics


def test_everything_but_the_head_is_frozen():
    model = tiny_model()
    model.head.bias.requires_grad_(False)
    freeze_all_but_head(model)
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    assert trained == ["head.weight", "head.bias"]


def test_the_bias_begins_at_the_value():
    model = tiny_model()
    weight = model.head.weight.detach().clone()
    start_head_bias(model, -6.9)
    assert model.head.bias.tolist() == pytest.approx([-6.9] * 7)
    assert torch.equal(model.head.weight, weight)
    assert model.head.bias.requires_grad


def test_a_model_without_a_head_is_refused():
    model = tiny_model(num_classes=0)
    with pytest.raises(UserError, match="no head"):
        freeze_all_but_head(model)
    with pytest.raises(UserError, match="no head"):
        start_head_bias(model, 0.0)
    assert all(parameter.requires_grad for parameter in model.parameters())
