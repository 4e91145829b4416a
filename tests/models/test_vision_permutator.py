"""Vision Permutator: its authors' logits, sizes and counts; both branches; image sizes; errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mlp_mixer as mm
from mlp_mixer.models.catalog import ARCHITECTURES
from mlp_mixer.models.layers import StochasticDepth
from mlp_mixer.models.vision_permutator import PermutatorFusion, VisionPermutatorConfig
from staged_models import check_golden, small_permutator

GOLDEN = {
    "vip_s14": ([-0.970299, -0.817247, 0.014708, 1.238866], -16.03232, 0.403018, 357),
    "vip_s7": ([-0.237898, -0.182930, 0.936684, -0.606181], 3.03158, 0.371115, 930),
    "vip_l7": ([0.112851, 0.407333, 0.027924, -0.018620], -3.32785, 0.398873, 196),
}
#            parameters, entries of the state dict, GMACs, places of the stages in `network`
COUNTS = {
    "vip_s14": (29_892_904, 312, "6.856", (0, 1, 2, 3)),
    "vip_s7": (25_114_984, 314, "6.902", (0, 2, 3, 4)),
    "vip_m7": (55_272_488, 416, "16.284", (0, 1, 3, 4)),
    "vip_l7": (87_784_936, 620, "24.340", (0, 2, 3, 4)),
}


@pytest.mark.parametrize(
    "name", ["vip_s7", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vip_s14", "vip_l7"))]
)
def test_logits_equal_the_authors(name: str):
    check_golden(name, *GOLDEN[name])


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str):
    parameters, entries, gmacs, places = COUNTS[name]
    with torch.device("meta"):
        model = mm.create_model(name)
    assert sum(each.numel() for each in model.parameters()) == parameters
    assert len(model.state_dict()) == entries
    assert f"{model.config.flops / 2e9:.3f}" == gmacs
    found = [at for at, part in enumerate(model.network) if isinstance(part, nn.Sequential)]
    assert tuple(found) == model.config.stage_indices == places


def test_the_authors_rule_of_segments():
    """At 224 pixels the segments are as many as the grid has rows, and the maps are C x C."""
    for name in COUNTS:
        config = ARCHITECTURES[name]
        assert isinstance(config, VisionPermutatorConfig)
        assert config.grids == tuple((g, g) for g in config.segments)


@pytest.mark.parametrize(
    ("size", "changes"), [(8, {}), ((12, 4), {"in_channels": 1, "num_classes": 0}), (16, {})]
)
def test_operations_are_those_that_torch_counts(size: Any, changes: dict[str, Any]):
    model = small_permutator(**{"image_size": size, **changes})
    config = model.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, config.in_channels, *config.image_size))
    assert counter.get_total_flops() == config.flops


def test_the_published_tensors():
    with torch.device("meta"):
        tensors = mm.create_model("vip_s7").state_dict()
    shapes = {name: tuple(each.shape) for name, each in tensors.items()}
    block = {name[12:]: s for name, s in shapes.items() if name.startswith("network.2.1.")}
    assert block == {
        **{f"norm{n}.{kind}": (384,) for n in (1, 2) for kind in ("weight", "bias")},
        **{f"attn.mlp_{branch}.weight": (384, 384) for branch in "chw"},
        "attn.reweight.fc1.weight": (96, 384),
        "attn.reweight.fc1.bias": (96,),
        "attn.reweight.fc2.weight": (1152, 96),
        "attn.reweight.fc2.bias": (1152,),
        "attn.proj.weight": (384, 384),
        "attn.proj.bias": (384,),
        "mlp.fc1.weight": (1152, 384),
        "mlp.fc1.bias": (1152,),
        "mlp.fc2.weight": (384, 1152),
        "mlp.fc2.bias": (384,),
    }
    assert shapes["network.1.proj.weight"] == (384, 192, 2, 2)
    assert shapes["patch_embed.proj.weight"] == (192, 3, 7, 7)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2)])
def test_the_branches_by_their_equations(grid: tuple[int, int]):
    torch.manual_seed(0)
    (height, width), segments, size = grid, 4, 3
    mixing = PermutatorFusion(segments * size, segments, grid).double()
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
    mixing = PermutatorFusion(8, 2, (3, 3)).double()
    x = torch.randn(2, 3, 3, 8, dtype=torch.float64)
    h, w = mixing.branches(x)
    c = x @ mixing.mlp_c.weight.T
    z = mixing.reweight((h + w + c).mean(dim=(1, 2)))
    expected = torch.zeros_like(x)
    for k in range(8):
        share = torch.stack([z[:, 3 * k + branch] for branch in range(3)]).softmax(dim=0)
        for branch, values in enumerate((h, w, c)):
            expected[..., k] += share[branch].view(2, 1, 1) * values[..., k]
    torch.testing.assert_close(mixing(x), mixing.proj(expected))


def test_layer_norm_epsilon_and_gelu():
    model = small_permutator()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * 3 + 1
    assert {norm.eps for norm in norms} == {1e-5}
    x = torch.linspace(-4, 4, 100)
    gelus = [module for module in model.modules() if isinstance(module, nn.GELU)]
    assert all(torch.equal(gelu(x), F.gelu(x, approximate="none")) for gelu in gelus)


def test_stochastic_depth_rises_linearly_over_the_blocks():
    model = small_permutator(stochastic_depth=0.3)
    drops = [m.probability for m in model.modules() if isinstance(m, StochasticDepth)]
    assert drops == pytest.approx([0, 0, 0.15, 0.15, 0.3, 0.3])
    alone = small_permutator(
        depths=(1,), dims=(8,), mlp_ratios=(1,), segments=(2,), downsamples=(), stochastic_depth=0.3
    )
    assert [m.probability for m in alone.modules() if isinstance(m, StochasticDepth)] == [0, 0]


@pytest.mark.parametrize("size", [4, 12, (8, 20)])
def test_other_sizes_have_other_maps(size: Any):
    model = small_permutator(image_size=size)
    height, width = model.config.image_size
    assert model(torch.randn(1, 3, height, width)).shape == (1, 5)
    first = model.network[0][0].attn
    assert first.mlp_h.weight.shape == (height // 2 * 2, height // 2 * 2)
    assert first.mlp_w.weight.shape == (width // 2 * 2, width // 2 * 2)
    other = torch.randn(1, 3, height + 4, width)
    with pytest.raises(ValueError, match="a weight for each place in a row and column"):
        model(other)


def test_the_published_sizes():
    with pytest.raises(
        mm.UserError,
        match=r"224x200 .*by 14 \(the patch size 7, as the grid is halved once\);.*: 224x196",
    ):
        mm.create_model("vip_s7", (224, 200))
    with pytest.raises(
        mm.UserError, match="230x230 is not divisible by the patch size 14; the nearest"
    ):
        mm.create_model("vip_s14", 230)
    config = ARCHITECTURES["vip_m7"]
    assert isinstance(config, VisionPermutatorConfig)
    wide = dataclasses.replace(config, image_size=(448, 56))
    assert wide.grids == ((64, 8), (64, 8), (32, 4), (32, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10}, r"image size 10x10 is not divisible by 4.*: 8x8"),
        ({"segments": (3, 2)}, "8 channels do not divide into 3 segments"),
        ({"segments": (4,)}, "each stage has its own value: depths has 2, segments has 1"),
        ({"downsamples": (1,)}, "downsamples must be 1 of true and false"),
        ({"downsamples": (True, True)}, "downsamples must be 1 of true and false"),
        ({"downsamples": (False,)}, "change from 8 to 12 where the grid is not halved"),
        ({"patch_size": 0}, "patch_size must be a whole number"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str):
    with pytest.raises(mm.UserError, match=message):
        small_permutator(**changes)
