"""timm's weights: its logits, its names back, its containers, its preprocessing."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import allmlp as am
from conftest import GOLDEN, tiny_model

pytestmark = pytest.mark.numerics

WEIGHTS = GOLDEN / "timm_tiny.safetensors"


def test_the_golden_file_gives_timms_logits():
    model = am.load_model(WEIGHTS)
    assert model.config.gelu == "exact"
    with np.load(GOLDEN / "timm_tiny_io.npz") as io:
        images = torch.from_numpy(io["images_nchw"])
        assert (model(images) - torch.from_numpy(io["logits"])).abs().max() <= 1e-5
        assert (model.features(images) - torch.from_numpy(io["pre_logits"])).abs().max() <= 1e-5


def test_the_golden_round_trip_is_bit_for_bit(tmp_path: Path):
    path = am.save_model(am.load_model(WEIGHTS), tmp_path / "out.safetensors", format="timm")
    before, after = safetensors.torch.load_file(WEIGHTS), safetensors.torch.load_file(path)
    assert set(before) == set(after)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_our_own_description_travels_in_timms_format(tmp_path: Path):
    model = tiny_model(num_classes=2).eval()  # tanh, which timm's names alone do not say
    model.class_names = ["ant", "bee"]
    for place in (tmp_path / "one.safetensors", tmp_path / "folder"):
        loaded = am.load_model(am.save_model(model, place, format="timm"))
        assert loaded.config == model.config
        assert loaded.class_names == ["ant", "bee"]


def wrapped(kind: str) -> object:
    state = safetensors.torch.load_file(WEIGHTS)
    return {
        "bare": state,
        "state_dict": {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        "model": {"model": state, "optimizer": {"state": {}, "step": torch.zeros(3)}},
        "parallel": {f"module.{name}": value for name, value in state.items()},
        "compiled": {f"_orig_mod.module.{name}": value for name, value in state.items()},
    }[kind]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", ["bare", "state_dict", "model", "parallel", "compiled"])
def test_pth_files(tmp_path: Path, kind: str, old: bool):
    path = tmp_path / "weights.pth"
    torch.save(wrapped(kind), path, _use_new_zipfile_serialization=not old)
    state, expected = am.load_model(path).state_dict(), am.load_model(WEIGHTS).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def timm_folder(tmp_path: Path, **changes: object) -> Path:
    """A model as the hub has it: model.safetensors and timm's config.json."""
    settings = {
        "input_size": [3, 32, 32],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        **changes,
    }
    shutil.copy(WEIGHTS, tmp_path / "model.safetensors")
    config = {"architecture": "mixer_b16_224", "num_classes": 7, "pretrained_cfg": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_timms_preprocessing_comes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = am.load_model(timm_folder(tmp_path))
    expected = am.Preprocessing(image_size=(32, 32), mean=0.0, std=1.0, crop=0.9)
    assert model.preprocessing == expected
    assert capsys.readouterr().err == ""
    means = [0.485, 0.456, 0.406]
    folder = timm_folder(tmp_path, mean=means, std=[0.2, 0.2, 0.2], interpolation="bicubic")
    preprocessing = am.load_model(folder).preprocessing
    assert preprocessing is not None
    assert preprocessing.mean == tuple(means)
    assert (preprocessing.std, preprocessing.interpolation) == (0.2, "bicubic")
    names = ["a", "b", "c", "d", "e", "f", "g"]
    assert am.load_model(timm_folder(tmp_path, label_names=names)).class_names == names
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pretrained_cfg"]["label_names"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "label_names": names[::-1]}))
    assert am.load_model(tmp_path).class_names == names[::-1]
    with pytest.raises(am.UserError, match=r"not a preprocessing: std must be above 0"):
        am.load_model(timm_folder(tmp_path, std=[0, 0, 0]))


@pytest.mark.parametrize(
    ("settings", "expected", "note"),
    [
        ({"crop_mode": "squash"}, {"resize": "resize-crop"}, None),
        ({"crop_mode": "border"}, {}, "crop mode 'border' is not offered here"),
        ({"interpolation": "lanczos"}, {"interpolation": "bicubic"}, "interpolation 'lanczos'"),
        ({"interpolation": None}, {"interpolation": "bicubic"}, None),
        ({"crop_pct": None}, {"crop": 0.875}, None),
    ],
)
def test_what_timm_says_otherwise(tmp_path: Path, capsys, settings, expected, note):
    preprocessing = am.load_model(timm_folder(tmp_path, **settings)).preprocessing
    whole = {"mean": 0.0, "std": 1.0, "crop": 0.9, **expected}
    assert preprocessing == am.Preprocessing(image_size=(32, 32), **whole)
    assert (note or "") in capsys.readouterr().err


@pytest.mark.parametrize("size", [(8, 12), (8, 32), (16, 16)])
def test_rectangles_are_as_timm_says(tmp_path: Path, size: tuple[int, int]):
    """2 x 8 patches are as many as 4 x 4."""
    model = tiny_model(image_size=size, gelu="exact").eval()
    path = am.save_model(model, tmp_path / "model.safetensors", format="timm")
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file(state, path)  # without our description
    settings = {"input_size": [3, *size], "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": settings}))
    assert am.load_model(tmp_path).config.image_size == size


def test_a_grey_model_of_timms(tmp_path: Path):
    model = tiny_model(image_size=32, in_channels=1, gelu="exact")
    path = am.save_model(model, tmp_path / "model.safetensors", format="timm")
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    means = {"mean": [0.3, 0.6, 0.9], "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": means}))
    preprocessing = am.load_model(tmp_path).preprocessing
    assert preprocessing is not None
    assert preprocessing.mean == pytest.approx(0.6)


def test_the_config_of_another_file_does_not_count(tmp_path: Path):
    """A .pth that lies in a folder of somebody else's model describes itself."""
    folder = timm_folder(tmp_path)
    torch.save(safetensors.torch.load_file(WEIGHTS), folder / "other.pth")
    model = am.load_model(folder / "other.pth", quiet=True)
    assert model.preprocessing == am.Preprocessing(image_size=(32, 32))


def test_a_published_file_is_known_by_its_name(tmp_path: Path):
    """timm's file names end in the hash of the file, so that they cannot mean another."""
    path = tmp_path / "mixer_b16_224_miil-9229a591.pth"
    torch.save(safetensors.torch.load_file(WEIGHTS), path)
    with pytest.raises(am.UserError, match=r"mixer_b16\.miil_in21k_ft_in1k has 1,000 classes"):
        am.load_model(path)


def test_another_family_with_similar_names(tmp_path: Path):
    path = tmp_path / "vit.safetensors"
    names = ("norm.weight", "blocks.0.norm1.weight", "patch_embed.proj.weight", "head.bias")
    safetensors.torch.save_file({name: torch.zeros(3) for name in names}, path)
    with pytest.raises(am.UserError, match=r"timm's, but stem\.proj\.weight is missing"):
        am.load_model(path)
