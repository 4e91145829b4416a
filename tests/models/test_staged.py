"""What CycleMLP and Vision Permutator share: their authors' logits, counts, norms and GELU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import allmlp as am
from allmlp.models.layers import StochasticDepth
from staged_models import check_golden, small_cycle, small_permutator

pytestmark = pytest.mark.numerics

GOLDEN = {
    "cycle_mlp_b1": ([0.517229, 0.118039, -0.038621, 0.951164], -3.50672, 0.400535, 364),
    "cycle_mlp_b2": ([-0.173672, 0.136614, 0.868855, 0.231556], 15.34931, 0.394153, 487),
    "cycle_mlp_b4": ([0.356184, -0.080879, 0.199518, 0.308029], 12.10518, 0.486444, 39),
    "vip_s14": ([-0.970299, -0.817247, 0.014708, 1.238866], -16.03232, 0.403018, 357),
    "vip_s7": ([-0.237898, -0.182930, 0.936684, -0.606181], 3.03158, 0.371115, 930),
    "vip_l7": ([0.112851, 0.407333, 0.027924, -0.018620], -3.32785, 0.398873, 196),
}
FAST = ("cycle_mlp_b1", "vip_s7")
#                parameters, entries of the state dict, GMACs
COUNTS = {
    "cycle_mlp_b1": (15_155_400, 222, "2.122"),
    "cycle_mlp_b2": (26_802_504, 390, "3.876"),
    "cycle_mlp_b3": (38_385_720, 600, "6.831"),
    "cycle_mlp_b4": (51_796_552, 873, "10.027"),
    "cycle_mlp_b5": (75_747_280, 726, "12.232"),
    "vip_s14": (29_892_904, 312, "6.856"),
    "vip_s7": (25_114_984, 314, "6.902"),
    "vip_m7": (55_272_488, 416, "16.284"),
    "vip_l7": (87_784_936, 620, "24.340"),
}
GRAY = {"in_channels": 1, "num_classes": 0}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in GOLDEN]
)
def test_logits_equal_the_authors(name: str):
    check_golden(name, *GOLDEN[name])


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str):
    parameters, entries, gmacs = COUNTS[name]
    with torch.device("meta"):
        model = am.create_model(name)
    assert sum(each.numel() for each in model.parameters()) == parameters
    assert len(model.state_dict()) == entries
    assert f"{model.config.flops / 2e9:.3f}" == gmacs


@pytest.mark.parametrize(
    ("small", "size", "changes"),
    [
        (small_cycle, 16, {}),
        (small_cycle, (21, 34), GRAY),
        (small_cycle, 5, {}),
        (small_permutator, 8, {}),
        (small_permutator, (12, 4), GRAY),
        (small_permutator, 16, {}),
    ],
)
def test_operations_are_those_that_torch_counts(
    small: Callable[..., am.ImageClassifier], size: Any, changes: dict[str, Any]
):
    model = small(**{"image_size": size, **changes})
    config = model.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, config.in_channels, *config.image_size))
    assert counter.get_total_flops() == config.flops


@pytest.mark.parametrize("small", [small_cycle, small_permutator])
def test_layer_norm_epsilon_and_gelu(small: Callable[[], am.ImageClassifier]):
    model = small()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * 3 + 1
    assert {norm.eps for norm in norms} == {1e-5}
    x = torch.linspace(-4, 4, 100)
    gelus = [module for module in model.modules() if isinstance(module, nn.GELU)]
    assert len(gelus) == 2 * 3
    assert all(torch.equal(gelu(x), F.gelu(x, approximate="none")) for gelu in gelus)


def test_stochastic_depth_rises_linearly_over_the_blocks():
    for model, expected in (
        (small_cycle(depths=(2, 3), stochastic_depth=0.2), [0, 0.05, 0.1, 0.15, 0.2]),
        (small_permutator(stochastic_depth=0.3), [0, 0.15, 0.3]),
    ):
        drops = [m.probability for m in model.modules() if isinstance(m, StochasticDepth)]
        assert drops == pytest.approx([rate for rate in expected for _ in range(2)])
