"""mixer convert, models --weights and --inspect, and the flags for another size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import allmlp as am
from conftest import GOLDEN, draw, mixer, tiny_model

PARAMS = GOLDEN / "official_tiny_params.npz"
TIMM = GOLDEN / "timm_tiny.safetensors"


def logits(path: Path, size: int = 32) -> torch.Tensor:
    torch.manual_seed(3)
    return am.load_model(path, quiet=True)(torch.randn(2, 3, size, size))


def test_the_way_round_through_all_formats(capsys, tmp_path: Path):
    steps = [
        ("a", ()),
        ("b.safetensors", ("--format", "timm")),
        ("c.npz", ()),
        ("d.safetensors", ("--format", "allmlp")),
    ]
    source = PARAMS
    for name, flags in steps:
        code, out, err = mixer(capsys, "convert", source, tmp_path / name, *flags)
        assert code == 0, err
        assert f"written  {tmp_path / name}" in out
        source = tmp_path / name
    assert torch.equal(logits(source), logits(PARAMS))
    mixer(capsys, "convert", source, tmp_path / "e.npz")
    with np.load(PARAMS) as before, np.load(tmp_path / "e.npz") as after:
        assert set(before) == set(after)
        assert all(np.array_equal(before[key], after[key]) for key in before)


def test_what_another_program_does_differently_is_said(capsys, tmp_path: Path):
    _, out, _ = mixer(capsys, "convert", TIMM, tmp_path / "a.npz")
    assert "note     Google's code computes the tanh GELU, this model the exact one" in out
    _, out, _ = mixer(capsys, "convert", PARAMS, tmp_path / "b.safetensors", "--format", "timm")
    assert "note     timm computes the exact GELU, this model the tanh one" in out
    _, out, _ = mixer(capsys, "convert", PARAMS, tmp_path / "c.npz")
    assert "note" not in out


def test_another_size_and_head(capsys, tmp_path: Path):
    target = tmp_path / "large"
    flags = ("--image-size", "64x96", "--num-classes", "3")
    code, out, err = mixer(capsys, "convert", PARAMS, target, *flags)
    assert code == 0
    assert "resized  32x32 -> 64x96 pixels: block-diagonal, 2x3 tiles" in err
    assert "head     new, all zeros, for 3 classes; the weights had 7 classes" in err
    assert "64x96 pixels, 3 classes" in out
    assert json.loads((target / "config.json").read_text())["architecture"]["image_size"] == [
        64,
        96,
    ]
    flags = ("--image-size", "64", "--resize-weights", "resample")
    _, _, err = mixer(capsys, "convert", PARAMS, tmp_path / "other.npz", *flags)
    assert "resampled (nearest)" in err


def test_nothing_is_overwritten_unasked(capsys, tmp_path: Path):
    target = tmp_path / "a.safetensors"
    mixer(capsys, "convert", PARAMS, target)
    before = target.read_bytes()
    code, _, err = mixer(capsys, "convert", TIMM, target)
    assert code == 2
    assert "already" in err
    assert "overwrite" in err
    assert target.read_bytes() == before
    assert mixer(capsys, "convert", TIMM, target, "--overwrite")[0] == 0
    assert torch.equal(logits(target), logits(TIMM))
    before = target.read_bytes()
    code, _, err = mixer(capsys, "convert", target, target, "--overwrite", "--image-size", "64")
    assert (code, target.read_bytes()) == (2, before)
    assert str(target) in err
    (tmp_path / "b.json").write_text("{}")  # would be replaced by what lies beside b.npz
    assert mixer(capsys, "convert", PARAMS, tmp_path / "b.npz")[0] == 2
    assert (tmp_path / "b.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PARAMS, "x.npz", "--format", "onnx"), "nvalid choice"),
        ((PARAMS, "x.pth"), "format allmlp is a .safetensors file, got 'x.pth'"),
        ((PARAMS, "x", "--image-size", "60"), "the nearest that is: 64x64"),
        ((PARAMS, "x", "--image-size", "big"), "not an image size: 'big'"),
        (
            (PARAMS, "x", "--image-size", "64", "--resize-weights", "magic"),
            "nvalid choice",
        ),
        ((PARAMS, "x", "--resize-weights", "resample"), "resize_weights needs image_size"),
        ((PARAMS, "x", "--image-size", "800000"), "GiB, the machine has"),
        ((PARAMS, "x", "--image-size", "9" * 5000), "not an image size"),
        ((PARAMS, "x.NPZ"), "Call it x.safetensors"),
        ((PARAMS, "x", "--num-classes", "-3"), "at least 0, got -3"),
        (("nowhere.npz", "x"), "no such model: 'nowhere.npz'"),
        (("mixer_b16", "x"), "has no weights of its own"),
    ],
)
def test_mistakes(capsys, tmp_path: Path, monkeypatch, arguments, message: str):
    monkeypatch.chdir(tmp_path)
    code, out, err = mixer(capsys, "convert", *arguments)
    assert code == 2
    assert message in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_inspect(capsys, tmp_path: Path):
    code, out, _ = mixer(capsys, "models", "--inspect", PARAMS)
    assert code == 0
    assert "npz, 66,600 bytes, 42 tensors" in out
    assert "3 layers, patch 8, 24 channels, 32x32 pixels, 7 classes" in out
    assert "names          Google's" in out
    assert "GELU           tanh" in out
    assert "values in [-1, 1]" in out
    row = ["MixerBlock_{0..2}/token_mixing/Dense_0/kernel", "16x12", "float32"]
    assert row in [line.split() for line in out.splitlines()]
    _, out, _ = mixer(capsys, "models", "--inspect", TIMM)
    assert "GELU           exact" in out
    assert "Google's is assumed" in out
    model = am.load_model(PARAMS, 64, quiet=True)
    path = am.save_model(model, tmp_path / "grown.safetensors")
    _, out, _ = mixer(capsys, "models", "--inspect", path)
    row = ["blocks.{0..2}.token_mixing.dense_0.weight", "48x64", "float32"]
    assert row in [line.split() for line in out.splitlines()]
    state = {**model.state_dict(), "stem.bias": torch.zeros(3)}
    safetensors.torch.save_file(state, path)
    code, out, _ = mixer(capsys, "models", "--inspect", path)
    assert code == 0  # what is in it can still be read
    assert "not a model    the tensors do not fit" in out
    assert "stem.bias is (3,), the architecture wants (24,)" in out


@pytest.mark.parametrize(
    "flags",
    [
        ("--weights", "--inspect", "x"),
        ("--weights", "--num-classes", "3"),
        ("--weights", "--image-size", "448"),
        ("--inspect", "x", "--num-classes", "3"),
    ],
)
def test_flags_that_would_be_ignored(capsys, flags):
    code, _, err = mixer(capsys, "models", *flags)
    assert code == 2
    assert "do not go together" in err


def test_the_published_weights(capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("MIXER_CACHE", str(tmp_path / "cache"))
    code, out, _ = mixer(capsys, "models", "--weights")
    assert code == 0
    lines = out.splitlines()
    assert sum(line.startswith("mixer_") for line in lines) == 2 * 17  # the table, then each
    assert "that is wrong: it is ImageNet-1k from scratch" in out
    assert "hf:timm/mixer_b16_224.miil_in21k" in out
    assert f"Downloads go to {tmp_path / 'cache'} (MIXER_CACHE changes that)." in out
    assert not (tmp_path / "cache").exists()


def test_other_sizes_in_evaluate_and_predict(capsys, trained: am.TrainResult):
    flags = ("--data", "digits:test", "--image-size", "32")
    code, out, err = mixer(capsys, "evaluate", trained.run_folder, *flags)
    assert code == 0
    assert "8x8 -> 32x32 pixels: block-diagonal, 4x4 tiles" in err
    assert "top-1" in out
    flags = ("--image-size", "24", "--resize-weights", "resample")
    code, out, err = mixer(capsys, "predict", trained.run_folder, "digits:test", *flags)
    assert code == 0
    assert "resampled (nearest)" in err


def test_a_model_without_names_predicts_numbers_and_is_not_measured(capsys, tmp_path: Path):
    model = tiny_model(num_classes=10)
    draw(1).save(tmp_path / "a.png")
    path = am.save_model(model, tmp_path / "x.safetensors")
    code, out, err = mixer(capsys, "predict", path, tmp_path / "a.png")
    assert code == 0
    assert err.startswith("note: ")
    assert "class names" in err
    assert len(set(re.findall(r"(\d) [\d.]+%", out))) == 5
    code, _, err = mixer(capsys, "evaluate", path, "--data", "digits:test")
    assert code == 2
    assert "the model carries no class names" in err
    assert "save_model" in err
    model.class_names = list("abcdefghij")  # what the message says to do
    path = am.save_model(model, tmp_path / "named.safetensors")
    code, out, err = mixer(capsys, "predict", path, tmp_path / "a.png")
    assert (code, err) == (0, "")
    assert len(set(re.findall(r"([a-j]) [\d.]+%", out))) == 5
