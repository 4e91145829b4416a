"""The network: equal to Google's, the paper's sizes, initialisers, stochastic depth, variants."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import allmlp as am
from allmlp.models.layers import StochasticDepth
from allmlp.models.mixer import UntiedLinear
from conftest import GOLDEN, TINY, tiny_model
from google_layout import official_model, our_layout, our_name

pytestmark = pytest.mark.numerics


def test_logits_and_every_gradient_equal_googles():
    with np.load(GOLDEN / "official_tiny_params.npz") as params_file:
        params = dict(params_file)
    with np.load(GOLDEN / "official_tiny_io.npz") as io_file:
        io = dict(io_file)
    sizes = {"hidden_dim": 24, "num_blocks": 3, "tokens_mlp_dim": 12, "channels_mlp_dim": 48}
    model = official_model(params, image_size=(32, 32), patch_size=8, num_classes=7, **sizes)
    logits = model(torch.from_numpy(io["images_nhwc"]).permute(0, 3, 1, 2))
    difference = (logits - torch.from_numpy(io["logits"])).abs().max()
    assert difference <= 1e-5 * np.abs(io["logits"]).max()
    loss = F.cross_entropy(logits, torch.from_numpy(io["labels"]).long())
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
    assert set(COUNTS) == {model for model in am.list_models() if model.startswith("mixer_")}
    for num_classes, expected in zip((0, 1000, 21843), COUNTS[name], strict=True):
        with torch.device("meta"):
            model = am.create_model(name, num_classes=num_classes)
        assert model.num_parameters == expected


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


# --- the variants of appendix A.1 -----------------------------------------------------------------


def variant(**settings: Any) -> am.MlpMixer:
    """On 3 x 4 tokens, with 3 blocks and 16 channels."""
    torch.manual_seed(0)
    model = am.create_model("mixer_s16", (12, 16), 5, **{**TINY, "num_blocks": 3, **settings})
    torch.nn.init.normal_(model.head.weight)
    return model


IMAGES = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(1))


def test_untied_with_equal_weights_in_all_channels_is_the_tied_one():
    plain, untied = variant(), variant(token_mixing="untied")
    tensors = {
        name: value.expand(untied.state_dict()[name].shape) if "token_mixing" in name else value
        for name, value in plain.state_dict().items()
    }
    untied.load_state_dict(tensors)
    assert (untied(IMAGES) - plain(IMAGES)).abs().max() < 1e-5
    with torch.no_grad():  # and one channel's weights touch that channel alone
        block = untied.blocks[0]
        before = block.mix_tokens(torch.ones(1, 12, 16))
        block.token_mixing.dense_0.weight[3] += 1.0
        changed = (block.mix_tokens(torch.ones(1, 12, 16)) - before).abs().amax(dim=(0, 1)) > 0
    assert changed.nonzero().flatten().tolist() == [3]


def test_a_group_is_its_neighbouring_channels():
    block = variant(token_mixing="grouped", token_groups=4).blocks[0]
    y = torch.randn(2, 12, 16)
    for group in range(4):  # channels 4g to 4g + 3, their columns one below the other
        columns = [y[:, :, 4 * group + at] for at in range(4)]
        mixed = block.token_mixing(torch.cat(columns, dim=1))
        for at in range(4):
            expected = mixed[:, 12 * at : 12 * (at + 1)]
            assert torch.allclose(block.mix_tokens(y)[:, :, 4 * group + at], expected, atol=1e-6)


def test_views_that_pass_the_channels_on_are_groups():
    views = variant(token_mixing="views", token_groups=4)
    grouped = variant(token_mixing="grouped", token_groups=4)
    tensors = views.state_dict()
    for name in [name for name in tensors if name.endswith("views.weight")]:
        views.get_parameter(name).data = torch.eye(16)
        del tensors[name]
    grouped.load_state_dict(tensors)
    assert (views(IMAGES) - grouped(IMAGES)).abs().max() < 1e-6


def test_a_pyramid_has_fewer_tokens_from_its_block_on():
    model = variant(pyramid=((1, 7),))
    assert model.config.tokens == (12, 12, 7, 7)
    seen: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape)))
    model(IMAGES)
    assert seen == [(3, 12, 16), (3, 7, 16), (3, 7, 16)]


def test_initial_weights_of_an_untied_layer_have_the_variance_of_their_fan_in():
    torch.manual_seed(0)
    layer = UntiedLinear(64, 100, 30)
    assert layer.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert not layer.bias.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stochastic_depth": "0.1"}, r"stochastic_depth must be in \[0, 1\)"),
        ({"num_blocks": 0}, "num_blocks must be a whole number of at least 1, got 0"),
        ({"gelu": "relu"}, "gelu must be one of tanh, exact"),
        ({"num_classes": -1}, "num_classes must be a whole number of at least 0"),
        ({"image_size": (8, 8, 3)}, "image_size must be"),
        ({"image_size": (10, 8)}, r"10x8.*patch size 4.*nearest.*8x8"),
        ({"token_mixing": "grouped", "token_groups": 3}, "must divide 16 channels"),
        ({"token_groups": 2}, "no effect with token_mixing='shared'"),
        ({"pyramid": ((1, 4),)}, "bring 4 tokens down to fewer"),
        ({"pyramid": ((1, 2), (0, 1))}, "rise from 0 to 1"),
        ({"pyramid": ((2, 3),)}, "rise from 0 to 1"),
        ({"pyramid": (4,)}, "pairs of a block and its tokens"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        am.MixerConfig(**{"image_size": (8, 8), **TINY, **changes})
