"""CycleMLP: its tensors; the shifts; new weights; images of any size; errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import allmlp as am
from allmlp.models.catalog import architectures
from allmlp.models.cycle_mlp import CycleFC, CycleMLPConfig, runs_of
from staged_models import small_cycle

# Elements of the offsets of B1 and so on.

pytestmark = pytest.mark.numerics

OFFSETS = {1: 10_752, 2: 20_992, 3: 32_000, 4: 45_568, 5: 50_304}


@pytest.mark.parametrize("number", OFFSETS)
def test_counts_of_the_offsets(number: int):
    with torch.device("meta"):
        tensors = am.create_model(f"cycle_mlp_b{number}").state_dict()
    assert sum(v.numel() for k, v in tensors.items() if k.endswith(".offset")) == OFFSETS[number]


def test_the_published_tensors():
    """Names and shapes of a block of B1, as the authors' file has them."""
    with torch.device("meta"):
        tensors = am.create_model("cycle_mlp_b1").state_dict()
    shapes = {name: tuple(each.shape) for name, each in tensors.items()}
    block = {name[12:]: s for name, s in shapes.items() if name.startswith("network.0.1.")}
    of_fc = {"weight": (64, 64, 1, 1), "bias": (64,), "offset": (1, 128, 1, 1)}
    assert block == {
        **{f"norm{n}.{kind}": (64,) for n in (1, 2) for kind in ("weight", "bias")},
        "attn.mlp_c.weight": (64, 64),
        **{f"attn.sfc_{axis}.{kind}": of_fc[kind] for axis in "hw" for kind in of_fc},
        "attn.reweight.fc1.weight": (16, 64),
        "attn.reweight.fc1.bias": (16,),
        "attn.reweight.fc2.weight": (192, 16),
        "attn.reweight.fc2.bias": (192,),
        "attn.proj.weight": (64, 64),
        "attn.proj.bias": (64,),
        "mlp.fc1.weight": (256, 64),
        "mlp.fc1.bias": (256,),
        "mlp.fc2.weight": (64, 256),
        "mlp.fc2.bias": (64,),
    }
    assert shapes["patch_embed.proj.weight"] == (64, 3, 7, 7)
    assert [shapes[f"network.{n}.proj.weight"] for n in (1, 3, 5)] == [
        (128, 64, 3, 3),
        (320, 128, 3, 3),
        (512, 320, 3, 3),
    ]


def by_hand(fc: CycleFC, x: torch.Tensor) -> torch.Tensor:
    """The layer by its definition, a position and a channel at a time."""
    _, height, width, channels = x.shape
    shifts = fc.offset.view(-1, 2).long().tolist()
    read = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            for c in range(channels):
                at, to = i + shifts[c][0], j + shifts[c][1]
                if 0 <= at < height and 0 <= to < width:
                    read[:, i, j, c] = x[:, at, to, c]
    return read @ fc.weight[:, :, 0, 0].T + fc.bias


@pytest.mark.parametrize("along", ["width", "height"])
@pytest.mark.parametrize("grid", [(4, 5), (1, 3), (3, 1), (1, 1)])
def test_a_layer_by_its_definition(along: str, grid: tuple[int, int]):
    torch.manual_seed(0)
    fc = CycleFC(7, along, most=8).double()
    nn.init.normal_(fc.bias)
    x = torch.randn(2, *grid, 7, dtype=torch.float64)
    torch.testing.assert_close(fc(x), by_hand(fc, x))
    steps = fc.offset.view(-1, 2)[:, 1 if along == "width" else 0].tolist()
    assert steps == [0, 1, -1, 0, 1, -1, 0]
    assert fc.offset.view(-1, 2)[:, 0 if along == "width" else 1].abs().max() == 0


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_the_shifts_are_those_of_the_buffer_that_is_loaded(k: int):
    """Another cycle than the published one, and one without any order, along both axes."""
    torch.manual_seed(1)
    fc, x = CycleFC(9, "width", most=8), torch.randn(2, 5, 6, 9)
    half = k // 2
    regular = torch.tensor([[0, (c + half) % k - half] for c in range(9)])
    anyhow = torch.randint(-half, half + 1, (9, 2))
    for shifts in (regular, anyhow):
        fc.load_state_dict({**fc.state_dict(), "offset": shifts.float().view(1, 18, 1, 1)})
        torch.testing.assert_close(fc(x), by_hand(fc, x))
    assert len(runs_of(regular, 8)) == k


def test_a_model_reads_the_buffers_of_a_state_dict():
    model, images = small_cycle(), torch.randn(2, 3, 16, 16)
    tensors = {name: each.clone() for name, each in model.state_dict().items()}
    still = {n: torch.zeros_like(t) if n.endswith("offset") else t for n, t in tensors.items()}
    before = model(images)
    model.load_state_dict(still)
    assert (model(images) - before).abs().max() > 1e-3
    model.load_state_dict(tensors, assign=True)
    assert torch.equal(model(images), before)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "an offset is 0.5"),
        (float("nan"), "an offset is nan"),
        (float("inf"), "an offset is inf"),
        (1e9, r"shifts by 1e\+09 positions, beyond an image of 16"),
        (-17, "shifts by 17 positions"),
    ],
)
def test_offsets_that_cannot_be(value: float, message: str):
    model = small_cycle()
    tensors = model.state_dict()
    tensors["network.0.0.attn.sfc_w.offset"] = torch.full((1, 18, 1, 1), value)
    with pytest.raises(am.UserError, match=message):
        model.load_state_dict(tensors)


def test_new_weights():
    torch.manual_seed(0)
    model = am.create_model("cycle_mlp_b1", depths=(1, 1, 1, 1))
    for name, each in model.named_parameters():
        if "norm" in name:
            assert torch.equal(each, torch.full_like(each, float(name.endswith("weight")))), name
        elif ".proj." in name and "attn" not in name:  # a convolution: torch's own start
            limit = (each[0].numel() if each.dim() > 1 else 10**9) ** -0.5
            assert each.abs().max() <= limit or each.dim() == 1, name
            assert each.std() > 0.5 * limit, name
        elif each.dim() == 1:
            assert each.abs().max() == 0, name
        else:
            assert each.std().item() == pytest.approx(0.02, rel=0.06), name


@pytest.mark.parametrize("size", [4, 5, 31, 33, (7, 50)])
def test_the_same_weights_at_any_size(size: Any):
    model, other = small_cycle(), small_cycle(image_size=size)
    other.load_state_dict(model.state_dict())
    height, width = other.config.image_size
    images = torch.randn(1, 3, height, width)
    assert other(images).shape == (1, 5)
    grids = []
    for part in other.network:
        part.register_forward_hook(lambda _, __, out: grids.append(tuple(out.shape[1:3])))
    other(images)
    assert (grids[0], grids[-1]) == other.config.grids
    with pytest.raises(ValueError, match="load it with another image_size, the weights are the"):
        model(images)


def test_the_published_grids():
    config = architectures()["cycle_mlp_b1"]
    assert isinstance(config, CycleMLPConfig)
    assert config.grids == ((56, 56), (28, 28), (14, 14), (7, 7))
    wide = dataclasses.replace(config, image_size=(225, 193))
    assert wide.grids == ((56, 48), (28, 24), (14, 12), (7, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 3}, r"image size 3x3 is below the stem's stride of 4 pixels"),
        ({"dims": (9,)}, "dims has 1"),
        ({"dims": (9, 2)}, "dims must be at least 4"),
        ({"depths": (1, 0)}, r"depths must be whole numbers of at least 1, got \(1, 0\)"),
        ({"depths": 3}, "depths must be whole numbers of at least 1, got 3"),
        ({"mlp_ratios": (4, 1.5)}, "mlp_ratios must be whole numbers"),
        ({"stem_kernel": 3}, "leaves pixels out"),
        ({"stem_stride": 0}, "stem_stride must be a whole number of at least 1, got 0"),
        ({"stochastic_depth": 1.0}, "stochastic_depth must be in"),
        ({"in_channels": True}, "in_channels must be a whole number"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"image_size": (16, 16, 3)}, "image_size must be"),
        ({"dropout": 0.1}, "has no setting 'dropout'"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str):
    with pytest.raises(am.UserError, match=message):
        small_cycle(**changes)
