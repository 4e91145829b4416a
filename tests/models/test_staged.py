"""CycleMLP and Vision Permutator: equal to their authors' codes; shifts, maps and sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import allmlp as am
from allmlp.models.cycle_mlp import CycleFC
from allmlp.models.layers import StochasticDepth
from allmlp.models.vision_permutator import PermutatorFusion
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
#               parameters, entries of the state dict, GMACs, places of the stages in `network`
COUNTS = {
    "cycle_mlp_b1": (15_155_400, 222, "2.122", [0, 2, 4, 6]),
    "cycle_mlp_b2": (26_802_504, 390, "3.876", [0, 2, 4, 6]),
    "cycle_mlp_b3": (38_385_720, 600, "6.831", [0, 2, 4, 6]),
    "cycle_mlp_b4": (51_796_552, 873, "10.027", [0, 2, 4, 6]),
    "cycle_mlp_b5": (75_747_280, 726, "12.232", [0, 2, 4, 6]),
    "vip_s14": (29_892_904, 312, "6.856", [0, 1, 2, 3]),
    "vip_s7": (25_114_984, 314, "6.902", [0, 2, 3, 4]),
    "vip_m7": (55_272_488, 416, "16.284", [0, 1, 3, 4]),
    "vip_l7": (87_784_936, 620, "24.340", [0, 2, 3, 4]),
}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in GOLDEN]
)
def test_logits_equal_the_authors(name: str):
    check_golden(name, *GOLDEN[name])


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str):
    parameters, entries, gmacs, places = COUNTS[name]
    with torch.device("meta"):
        model = am.create_model(name)
    assert model.num_parameters == parameters
    assert len(model.state_dict()) == entries
    assert f"{model.config.flops / 2e9:.3f}" == gmacs
    stages = [at for at, part in enumerate(model.network) if isinstance(part, nn.Sequential)]
    assert stages == model.config.places == places


@pytest.mark.parametrize("along", [1, 2])
@pytest.mark.parametrize("grid", [(4, 5), (1, 3), (3, 1), (1, 1)])
def test_a_shifted_layer_by_its_definition(along: int, grid: tuple[int, int]):
    torch.manual_seed(0)
    fc = CycleFC(7, along).double()
    nn.init.normal_(fc.bias)
    x = torch.randn(2, *grid, 7, dtype=torch.float64)
    shifts = fc.offset.view(-1, 2).long().tolist()
    assert [pair[along - 1] for pair in shifts] == [0, 1, -1, 0, 1, -1, 0]
    read = torch.zeros_like(x)
    for i in range(grid[0]):
        for j in range(grid[1]):
            for c, (down, right) in enumerate(shifts):
                if 0 <= i + down < grid[0] and 0 <= j + right < grid[1]:
                    read[:, i, j, c] = x[:, i + down, j + right, c]
    torch.testing.assert_close(fc(x), read @ fc.weight[:, :, 0, 0].T + fc.bias)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2)])
def test_the_branches_of_a_permutator_by_their_equations(grid: tuple[int, int]):
    torch.manual_seed(0)
    (height, width), segments, size = grid, 4, 3
    mixing = PermutatorFusion(segments * size, size, grid).double()
    x = torch.randn(2, height, width, segments * size, dtype=torch.float64)
    parts = x.view(2, height, width, segments, size)  # the segment is the slow index
    maps = mixing.mlp_h.weight.view(height, size, height, size)
    high = torch.einsum("psqt,nqjgt->npjgs", maps, parts)
    maps = mixing.mlp_w.weight.view(width, size, width, size)
    wide = torch.einsum("psqt,niqgt->nipgs", maps, parts)
    found = mixing.branches(x)
    torch.testing.assert_close(found[0], high.reshape(x.shape))
    torch.testing.assert_close(found[1], wide.reshape(x.shape))


def test_the_fusion_by_its_equation():
    """A softmax for each channel over the branches, by the mean of their sum."""
    torch.manual_seed(0)
    mixing = PermutatorFusion(8, 4, (3, 3)).double()
    x = torch.randn(2, 3, 3, 8, dtype=torch.float64)
    h, w = mixing.branches(x)
    c = x @ mixing.mlp_c.weight.T
    z = mixing.reweight((h + w + c).mean(dim=(1, 2)))
    expected = torch.zeros_like(x)
    for k in range(8):
        fraction = torch.stack([z[:, 3 * k + branch] for branch in range(3)]).softmax(dim=0)
        for branch, values in enumerate((h, w, c)):
            expected[..., k] += fraction[branch].view(2, 1, 1) * values[..., k]
    torch.testing.assert_close(mixing(x), mixing.proj(expected))


def test_new_weights():
    torch.manual_seed(0)
    model = am.create_model("cycle_mlp_b1", depths=(1, 1, 1, 1))
    for name, value in model.named_parameters():
        if "norm" in name:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), name
        elif ".proj." in name and "attn" not in name:  # a convolution: torch's own start
            limit = (value[0].numel() if value.dim() > 1 else 10**9) ** -0.5
            assert value.abs().max() <= limit or value.dim() == 1, name
            assert value.std() > 0.5 * limit, name
        elif value.dim() == 1:
            assert value.abs().max() == 0, name
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.06), name


@pytest.mark.parametrize("size", [4, 5, 31, 33, (7, 50)])
def test_cycle_mlp_has_the_same_weights_at_any_size(size: Any):
    model, other = small_cycle(), small_cycle(image_size=size)
    other.load_state_dict(model.state_dict())
    grids = []
    for part in other.network:
        part.register_forward_hook(lambda _, __, out: grids.append(tuple(out.shape[1:3])))
    assert other(torch.randn(1, 3, *other.config.image_size)).shape == (1, 5)
    assert (grids[0], grids[-1]) == other.config.grids


@pytest.mark.parametrize("small", [small_cycle, small_permutator])
def test_stochastic_depth_rises_linearly(small: Callable[..., am.ImageClassifier]):
    model = small(depths=(2, 3), stochastic_depth=0.2)
    drops = [m.probability for m in model.modules() if isinstance(m, StochasticDepth)]
    assert drops == pytest.approx([rate for rate in (0, 0.05, 0.1, 0.15, 0.2) for _ in range(2)])
