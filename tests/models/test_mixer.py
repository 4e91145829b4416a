"""The network: equal to Google's, the paper's sizes, initialisers, stochastic depth, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import allmlp as am
from allmlp.models.layers import StochasticDepth, lecun_normal_
from allmlp.models.mixer import MlpBlock
from conftest import GOLDEN, TINY, tiny_model
from google_layout import official_model, our_layout, our_name

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def golden() -> tuple[am.MlpMixer, dict[str, np.ndarray], dict[str, np.ndarray]]:
    with np.load(GOLDEN / "official_tiny_params.npz") as file:
        params = dict(file)
    with np.load(GOLDEN / "official_tiny_io.npz") as file:
        io = dict(file)
    sizes = {"hidden_dim": 24, "num_blocks": 3, "tokens_mlp_dim": 12, "channels_mlp_dim": 48}
    model = official_model(params, image_size=(32, 32), patch_size=8, num_classes=7, **sizes)
    return model, params, io


def test_logits_equal_googles(golden):
    model, _, io = golden
    images = torch.from_numpy(io["images_nhwc"]).permute(0, 3, 1, 2)
    difference = (model(images) - torch.from_numpy(io["logits"])).abs().max()
    assert difference <= 1e-5 * np.abs(io["logits"]).max()


def test_every_gradient_equals_googles(golden):
    model, params, io = golden
    images = torch.from_numpy(io["images_nhwc"]).permute(0, 3, 1, 2)
    model.zero_grad()
    loss = F.cross_entropy(model(images), torch.from_numpy(io["labels"]).long())
    loss.backward()
    assert loss.item() == pytest.approx(float(io["loss"]), rel=1e-6)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert len(ours) == len(params) == 42
    largest = max(np.abs(io[f"grad:{key}"]).max() for key in params)
    for key in params:
        expected = our_layout(key, io[f"grad:{key}"])
        assert (ours[our_name(key)] - expected).abs().max() <= 1e-5 * largest, key


# reference: Google's own test pins B/32, B/16 and L/16; the others follow from the formula below
COUNTS = {
    "mixer_s32": (18_591_624, 19_104_624, 29_797_083),
    "mixer_s16": (18_015_264, 18_528_264, 29_220_723),
    "mixer_s8": (20_133_504, 20_646_504, 31_338_963),
    "mixer_b32": (59_524_428, 60_293_428, 76_321_695),
    "mixer_b16": (59_111_472, 59_880_472, 75_908_739),
    "mixer_l32": (205_914_264, 206_939_264, 228_303_339),
    "mixer_l16": (207_171_168, 208_196_168, 229_560_243),
    "mixer_h14": (431_069_952, 432_350_952, 459_050_835),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert set(COUNTS) == {each for each in am.list_models() if each.startswith("mixer_")}
    for num_classes, expected in zip((0, 1000, 21843), COUNTS[name], strict=True):
        with torch.device("meta"):
            model = am.create_model(name, num_classes=num_classes)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize(
    ("size", "channels", "classes"), [(8, 3, 5), ((8, 16), 1, 2), ((20, 4), 7, 1), (4, 3, 0)]
)
def test_any_size_channels_and_classes(size, channels, classes):
    model = am.create_model("mixer_s16", size, classes, **{**TINY, "in_channels": channels})
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, channels, height, width)
    assert model.config.num_tokens == height * width // 16
    assert model.features(images).shape == (2, 16)
    assert model(images).shape == (2, classes or 16)


def test_tokens_are_row_major_over_the_grid():
    """A weight that reads one token only sees one patch: token t is row t // 4, column t % 4."""
    model = am.create_model("mixer_s16", (8, 16), 0, **TINY)
    images = torch.zeros(1, 3, 8, 16)
    images[:, :, 4:8, 12:16] = 1.0  # row 1, column 3 of a 2 x 4 grid
    tokens = model.stem(images).flatten(2).transpose(1, 2)[0] - model.stem.bias
    assert tokens.abs().sum(dim=1).nonzero().flatten().tolist() == [7]


def test_initialisers_are_flaxs():
    torch.manual_seed(0)
    model = am.create_model("mixer_s32", 64, 10)
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            assert parameter.abs().max() == 0, name
        elif parameter.dim() > 1:
            fan_in = parameter[0].numel()
            assert parameter.std().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.05), name
            limit = 2 / math.sqrt(fan_in) / 0.87962566103423978
            assert parameter.abs().max() <= limit * 1.0001, name
        elif name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_lecun_normal_is_truncated_not_clipped():
    torch.manual_seed(0)
    weight = lecun_normal_(torch.empty(1000, 400))
    limit = 2 / 20 / 0.87962566103423978
    assert weight.abs().max() <= limit
    assert (weight.abs() > 0.999 * limit).float().mean() < 1e-3  # clipping would pile up 5 % there


def test_layer_norm_epsilon_and_gelu():
    model = tiny_model()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5
    assert {norm.eps for norm in norms} == {1e-6}
    x = torch.linspace(-4, 4, 100)
    assert torch.equal(model.blocks[0].token_mixing.gelu(x), F.gelu(x, approximate="tanh"))
    assert torch.equal(tiny_model(gelu="exact").blocks[0].token_mixing.gelu(x), F.gelu(x))


def test_stochastic_depth_rises_linearly_over_the_mlps():
    model = tiny_model(num_blocks=3, stochastic_depth=0.5)
    drops = [m.probability for m in model.modules() if isinstance(m, StochasticDepth)]
    assert drops == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = StochasticDepth(0.25)
    branch = torch.rand(20_000, 3, 2) + 1.0
    out = drop(branch)
    kept = out.flatten(1).abs().sum(dim=1) > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(out[kept], branch[kept] / 0.75)
    assert out.mean().item() == pytest.approx(branch.mean().item(), rel=0.02)
    assert drop.eval()(branch) is branch


def test_dropout_follows_both_dense_layers():
    names = [name for name, _ in MlpBlock(4, 8, "tanh", 0.5).named_children()]
    assert names == ["dense_0", "gelu", "dropout_0", "dense_1", "dropout_1"]
    model = tiny_model(dropout=0.3)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert sum(isinstance(m, nn.Dropout) for m in model.modules()) == 8


def test_the_residual_stream_stays_float32_under_autocast():
    """CPU bf16 LayerNorm gives a bias gradient that is wrong by tens of per cent."""
    torch.manual_seed(0)
    model = am.create_model("mixer_s16", 32, 10, **{**TINY, "hidden_dim": 64})
    torch.nn.init.normal_(model.head.weight)
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    F.cross_entropy(model(images), labels).backward()
    exact = model.pre_head_layer_norm.bias.grad.clone()
    model.zero_grad()
    seen: list[torch.dtype] = []
    model.blocks.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(images).float(), labels)
    loss.backward()
    assert seen == [torch.float32]
    error = (model.pre_head_layer_norm.bias.grad - exact).norm() / exact.norm()
    assert error < 0.05


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, False),
        ({"pyramid": ((0, 2),)}, False),
        ({"token_mixing": "untied"}, True),
        ({"token_mixing": "grouped", "token_groups": 2}, True),
        ({"token_mixing": "views", "token_groups": 2}, True),
    ],
)
def test_whether_the_output_biases_of_the_token_mixing_count(changes, counts):
    model = tiny_model(**changes).double().eval()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    before = model(images)
    for block in model.blocks:
        torch.nn.init.normal_(block.token_mixing.dense_1.bias)
    moved = (model(images) - before).abs().max() / before.abs().max()
    assert moved > 1e-3 if counts else moved < 1e-12


def test_an_indivisible_size_names_both_numbers():
    with pytest.raises(am.UserError, match=r"200x224.*patch size 16.*nearest.*192x224"):
        am.create_model("mixer_b16", (200, 224))


def test_another_size_than_built_for_names_both():
    with pytest.raises(ValueError, match="built for images of 8x8 pixels, got 12x8"):
        tiny_model()(torch.randn(1, 3, 12, 8))
    with pytest.raises(ValueError, match="built for 3 input channels, the images have 1"):
        tiny_model()(torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"expected images \(N, channels, H, W\), got \(3, 8, 8\)"):
        tiny_model()(torch.randn(3, 8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 1.0}, "dropout must be in"),
        ({"stochastic_depth": -0.1}, "stochastic_depth must be in"),
        ({"num_blocks": 0}, "num_blocks must be a whole number of at least 1, got 0"),
        ({"gelu": "relu"}, "gelu must be"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
    ],
)
def test_values_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        am.MixerConfig(**{"image_size": (8, 8), **TINY, **change})
