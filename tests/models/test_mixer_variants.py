"""The variants of appendix A.1: what they equal, what they cost, and that they go everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import allmlp as am
from allmlp.models.catalog import architecture_name, model_config
from allmlp.models.mixer_config import MixerConfig
from allmlp.models.mixer_variants import MixerVariant, UntiedLinear, VariantBlock
from conftest import TINY

pytestmark = pytest.mark.numerics

VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"token_mixing": "untied"},
    "grouped": {"token_mixing": "grouped", "token_groups": 4},
    "views": {"token_mixing": "views", "token_groups": 4},
    "pyramid": {"pyramid": ((1, 7),)},
    "steep pyramid": {"pyramid": ((0, 6), (2, 1))},
    "untied pyramid": {"token_mixing": "untied", "pyramid": ((1, 5),)},
    "grouped pyramid": {"token_mixing": "grouped", "token_groups": 2, "pyramid": ((0, 5),)},
    "views pyramid": {"token_mixing": "views", "token_groups": 8, "pyramid": ((2, 3),)},
}


def build(size: Any = (12, 16), classes: int = 5, seed: int = 0, **settings: Any) -> am.MlpMixer:
    torch.manual_seed(seed)
    model = am.create_model("mixer_s16", size, classes, **{**TINY, "num_blocks": 3, **settings})
    assert isinstance(model, am.MlpMixer)
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight)
    return model


def mixer_config(name: str, **settings: Any) -> MixerConfig:
    config = model_config(name, **settings)
    assert isinstance(config, MixerConfig)
    return config


def images(number: int = 3, size: tuple[int, int] = (12, 16), seed: int = 1) -> Tensor:
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(seed))


def plain_twin(model: am.MlpMixer, tensors: dict[str, Tensor]) -> am.MlpMixer:
    twin = build(classes=model.config.num_classes)
    twin.load_state_dict(tensors)
    return twin


def test_untied_with_equal_weights_in_all_channels_is_the_tied_one():
    plain, untied = build(), build(token_mixing="untied")
    tensors = {
        name: value.expand(untied.state_dict()[name].shape) if "token_mixing" in name else value
        for name, value in plain.state_dict().items()
    }
    untied.load_state_dict(tensors)
    assert (untied(images()) - plain(images())).abs().max() < 1e-5
    with torch.no_grad():  # and one channel's weights touch that channel alone
        block = untied.blocks[0]
        assert isinstance(block, VariantBlock)
        before = block.mix_tokens(torch.ones(1, 12, 16))
        block.token_mixing.dense_0.weight[3] += 1.0
        changed = (block.mix_tokens(torch.ones(1, 12, 16)) - before).abs().amax(dim=(0, 1)) > 0
    assert changed.nonzero().flatten().tolist() == [3]


def test_one_group_is_the_plain_one():
    grouped = build(token_mixing="grouped", token_groups=1)
    assert isinstance(grouped, MixerVariant)
    plain = plain_twin(grouped, grouped.state_dict())
    assert type(plain) is am.MlpMixer
    assert torch.equal(grouped(images()), plain(images()))


def test_a_group_is_its_neighbouring_channels():
    model = build(token_mixing="grouped", token_groups=4)
    block = model.blocks[0]
    assert isinstance(block, VariantBlock)
    y = torch.randn(2, 12, 16)
    for group in range(4):  # channels 4g to 4g + 3, their columns one below the other
        columns = [y[:, :, 4 * group + at] for at in range(4)]
        mixed = block.token_mixing(torch.cat(columns, dim=1))
        for at in range(4):
            expected = mixed[:, 12 * at : 12 * (at + 1)]
            found = block.mix_tokens(y)[:, :, 4 * group + at]
            assert torch.allclose(found, expected, atol=1e-6)


def test_views_that_pass_the_channels_on_are_groups():
    views = build(token_mixing="views", token_groups=4)
    grouped = build(token_mixing="grouped", token_groups=4)
    tensors = views.state_dict()
    for name in [name for name in tensors if name.endswith("views.weight")]:
        views.get_parameter(name).data = torch.eye(16)
        del tensors[name]
    grouped.load_state_dict(tensors)
    assert (views(images()) - grouped(images())).abs().max() < 1e-6


def test_a_pyramid_has_fewer_tokens_from_its_block_on():
    model = build(pyramid=((1, 7),))
    assert model.config.tokens == (12, 12, 7, 7)
    seen: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape)))
    model(images())
    assert seen == [(3, 12, 16), (3, 7, 16), (3, 7, 16)]


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_parameters_by_the_closed_formula(settings):
    model = build(**settings)
    assert sum(each.numel() for each in model.parameters()) == model.config.num_parameters


def test_initial_weights_have_the_variance_of_their_fan_in():
    torch.manual_seed(0)
    layer = UntiedLinear(64, 100, 30)
    assert layer.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert not layer.bias.any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"token_mixing": "grouped", "token_groups": 3}, "must divide hidden_dim, 16"),
        ({"token_groups": 2}, "no effect with token_mixing='shared'"),
        ({"token_mixing": "tied"}, "must be one of shared, untied, grouped, views"),
        ({"pyramid": ((1, 12),)}, "bring 12 tokens down to fewer"),
        ({"pyramid": ((1, 6), (0, 3))}, "rise from 0 to 2"),
        ({"pyramid": ((3, 6),)}, "rise from 0 to 2"),
        ({"pyramid": ((1, 0),)}, "down to fewer"),
        ({"pyramid": (4,)}, "pairs of a block and its tokens"),
        ({"token_mixing": "grouped", "token_groups": 0}, "must divide"),
        ({"token_mixing": "grouped", "token_groups": True}, "must divide"),
        ({"pyramid": ((1.5, 4.7),)}, "pairs of a block and its tokens"),
        ({"pyramid": ("14",)}, "pairs of a block and its tokens"),
        ({"pyramid": {}}, "pairs of a block and its tokens"),
        ({"num_blocks": True}, "whole number"),
        ({"stochastic_depth": "0.1"}, r"in \[0, 1\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(am.UserError, match=words):
        build(**settings)


def test_a_variant_is_called_by_its_name():
    config = mixer_config("mixer_b16", token_mixing="views", token_groups=4, pyramid=((6, 49),))
    assert architecture_name(config) == "mixer_b16 (4 learned views, pyramid 196 > 49)"
    assert config.summary().endswith("768 channels, 4 learned views, pyramid 196 > 49")
