"""Vision Permutator: its stages and tensors; both branches; image sizes; errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import allmlp as am
from allmlp.models.catalog import architectures
from allmlp.models.vision_permutator import PermutatorFusion, VisionPermutatorConfig
from staged_models import small_permutator

# Places of the stages in `network`.

pytestmark = pytest.mark.numerics

PLACES = {"s14": (0, 1, 2, 3), "s7": (0, 2, 3, 4), "m7": (0, 1, 3, 4), "l7": (0, 2, 3, 4)}


@pytest.mark.parametrize("name", PLACES)
def test_the_places_of_the_stages(name: str):
    with torch.device("meta"):
        model = am.create_model(f"vip_{name}")
    found = [at for at, part in enumerate(model.network) if isinstance(part, nn.Sequential)]
    assert tuple(found) == model.config.stage_indices == PLACES[name]


def test_the_authors_rule_of_segments():
    """At 224 pixels the segments are as many as the grid has rows, and the maps are C x C."""
    for name in PLACES:
        config = architectures()[f"vip_{name}"]
        assert isinstance(config, VisionPermutatorConfig)
        assert config.grids == tuple((g, g) for g in config.segments)


def test_the_published_tensors():
    with torch.device("meta"):
        tensors = am.create_model("vip_s7").state_dict()
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
        am.UserError,
        match=r"224x200 .*by 14 .*: 224x196",
    ):
        am.create_model("vip_s7", (224, 200))
    with pytest.raises(
        am.UserError, match="230x230 is not divisible by the patch size 14; the nearest"
    ):
        am.create_model("vip_s14", 230)
    config = architectures()["vip_m7"]
    assert isinstance(config, VisionPermutatorConfig)
    wide = dataclasses.replace(config, image_size=(448, 56))
    assert wide.grids == ((64, 8), (64, 8), (32, 4), (32, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10}, r"image size 10x10 is not divisible by 4.*: 8x8"),
        ({"segments": (3, 2)}, "8 channels do not divide into 3 segments"),
        ({"segments": (4,)}, "segments has 1"),
        ({"downsamples": (1,)}, "downsamples must be 1 of true and false"),
        ({"downsamples": (True, True)}, "downsamples must be 1 of true and false"),
        ({"downsamples": (False,)}, "change from 8 to 12 where the grid is not halved"),
        ({"patch_size": 0}, "patch_size must be a whole number"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str):
    with pytest.raises(am.UserError, match=message):
        small_permutator(**changes)
