"""Names of architectures, configurations to and from JSON, and what a classifier carries."""

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import allmlp as am
from allmlp.models.catalog import (
    architecture_name,
    architectures,
    config_from_json,
    config_to_json,
    model_config,
)
from conftest import tiny_model

OF_TIMM = {  # trained values with 1,000 classes, counted in timm 1.0.31
    "gmixer_24": 24_721_096,
    "resmlp_12": 15_350_872,
    "resmlp_24": 30_020_680,
    "resmlp_36": 44_690_488,
    "resmlp_big_24": 129_138_280,
    "gmlp_ti16": 5_867_328,
    "gmlp_s16": 19_422_656,
    "gmlp_b16": 73_075_392,
}


@pytest.mark.parametrize("name", OF_TIMM)
def test_sizes_of_timms_families(name: str):
    with torch.device("meta"):
        assert am.create_model(name).num_parameters == OF_TIMM[name]
    assert architecture_name(model_config(name, 448, 3, in_channels=1)) == name


def test_the_list():
    """Their sizes are pinned by the counts of parameters, in the tests of the networks."""
    mixers = [f"mixer_{size}" for size in ("s32", "s16", "s8", "b32", "b16", "l32", "l16", "h14")]
    others = [*(f"cycle_mlp_b{n}" for n in range(1, 6)), "vip_s14", "vip_s7", "vip_m7", "vip_l7"]
    assert am.list_models() == [*mixers, *OF_TIMM, *others]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mixer_b61", {}, r"unknown model 'mixer_b61'[\s\S]*Did you mean mixer_b"),
        ("mixer_b16", {"drop_out": 0.1}, r"no setting 'drop_out'[\s\S]*Did you mean dropout"),
        ("mixer_s16", {"num_blocks": "many"}, "cannot build mixer_s16"),
        ("cycle_mlp_b1", {"image_size": 3}, "size 3x3 is below the stem's stride of 4 pixels"),
        ("cycle_mlp_b1", {"dims": (9,)}, "dims has 1"),
        ("cycle_mlp_b1", {"dims": (9, 2, 9, 9)}, "dims must be at least 4"),
        ("cycle_mlp_b1", {"depths": (1, 0)}, r"depths must be whole numbers .*, got \(1, 0\)"),
        ("cycle_mlp_b1", {"in_channels": True}, "in_channels must be a whole number"),
        ("vip_s7", {"image_size": (224, 200)}, "224x200 .*by 14 .*: 224x196"),
        ("vip_s7", {"segments": (5, 16, 16, 16)}, "192 channels do not divide into 5 segments"),
        ("vip_s7", {"segments": (4,)}, "segments has 1"),
        ("vip_s7", {"downsamples": (1, 0, 0)}, "downsamples must be 3 of true and false"),
    ],
)
def test_what_cannot_be_built(name: str, settings: dict[str, Any], message: str):
    with pytest.raises(am.UserError, match=message):
        am.create_model(name, **settings)


@pytest.mark.parametrize("name", ["mixer_l16", "cycle_mlp_b3", "vip_m7"])
def test_names_of_architectures(name):
    """Whatever the size, the classes and the colours; not with another width."""
    config = model_config(name, 448, 3, in_channels=1, stochastic_depth=0.5)
    assert architecture_name(config) == name
    values = json.loads(json.dumps(config_to_json(config)))
    assert config_from_json(values) == config
    assert hash(config_from_json(values)) == hash(config)
    change = {"hidden_dim": 512} if name[0] == "m" else {"mlp_ratios": (2, 2, 2, 2)}
    assert architecture_name(model_config(name, **change)) is None


def test_names_of_variants_and_of_grown_models():
    config = model_config("mixer_s32", 448, tokens_mlp_dim=1024)
    assert architecture_name(config) == "mixer_s32 grown to 4 tiles"
    changes = {"token_mixing": "views", "token_groups": 4, "pyramid": ((6, 49),)}
    config = model_config("mixer_b16", **changes)
    assert architecture_name(config) == "mixer_b16 (4 learned views, pyramid 196 > 49)"
    assert config.summary().endswith("768 channels, 4 learned views, pyramid 196 > 49")


@pytest.mark.parametrize(
    "change", [{"family": "resnet"}, {"width": 3}, {"patch_size": 3}, {"image_size": "big"}]
)
def test_a_wrong_description_is_refused(change: dict[str, Any]):
    values = {**config_to_json(architectures()["mixer_s16"]), **change}
    with pytest.raises(am.UserError, match=r"mixer|resnet"):
        config_from_json(values)


def test_random_weights():
    model = tiny_model().eval()
    state = torch.get_rng_state()
    twin, again = am.random_weights(model, 3), am.random_weights(model, 3)
    assert (torch.get_rng_state() == state).all()
    assert twin.config == model.config
    assert not twin.training
    assert twin.preprocessing == model.preprocessing
    assert (twin.stem.weight == again.stem.weight).all()
    assert (twin.stem.weight != am.random_weights(model, 4).stem.weight).any()
    assert (twin.stem.weight != model.stem.weight).any()


def test_class_names_may_be_any_sequence_of_text():
    model = tiny_model(num_classes=3)
    for kind in (list, tuple, np.array, iter):
        model.class_names = kind(["ant", "bee", "cat"])
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.class_names == ["ant", "bee", "cat"]


@pytest.mark.parametrize("names", [["ant", "bee"], [0, 1, 2], "ant", {0: "a", 1: "b", 2: "c"}])
def test_wrong_class_names(names: Any):
    model = tiny_model(["x", "y", "z"])
    with pytest.raises(am.UserError, match="class names"):
        model.class_names = names
    model.class_names.append("w")
    with pytest.raises(am.UserError, match="4 class names for 3 classes"):
        am.predict(model, "digits:test")


def test_the_small_resnet():
    model = am.create_model("small_resnet", 32, 10)
    assert model.num_parameters == 696_234
    assert "small_resnet" not in am.list_models()
    odd = am.create_model("small_resnet", (9, 14), 3, width=8, num_blocks=1)  # does not halve
    with FlopCounterMode(display=False) as counter:
        odd(torch.zeros(1, 3, 9, 14))
    assert counter.get_total_flops() == odd.config.flops
    for settings in ({"width": 12}, {"image_size": 3}):
        with pytest.raises(am.UserError, match="cannot build small_resnet"):
            am.create_model("small_resnet", **settings)
