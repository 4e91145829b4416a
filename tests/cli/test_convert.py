"""mixer convert, models --weights and --inspect, and the flags for another size."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

import allmlp as am
from conftest import GOLDEN, mixer, ran, refused

PARAMS = GOLDEN / "official_tiny_params.npz"
TIMM = GOLDEN / "timm_tiny.safetensors"


def test_the_way_round_through_all_formats(capsys, tmp_path: Path):
    steps = [
        ("a", ()),
        ("b.safetensors", ("--format", "timm")),
        ("c.npz", ()),
        ("d.safetensors", ("--format", "allmlp")),
    ]
    source = PARAMS
    for name, flags in steps:
        out, _ = ran(capsys, "convert", source, tmp_path / name, *flags)
        assert f"written  {tmp_path / name}" in out
        source = tmp_path / name
    images = torch.randn(2, 3, 32, 32)
    found, expected = (am.load_model(path, quiet=True)(images) for path in (source, PARAMS))
    assert torch.equal(found, expected)


def test_another_size_and_head(capsys, tmp_path: Path):
    target = tmp_path / "large"
    flags = ("--image-size", "64x96", "--num-classes", "3")
    out, err = ran(capsys, "convert", PARAMS, target, *flags)
    assert "resized  32x32 -> 64x96 pixels: block-diagonal, 2x3 tiles" in err
    assert "head     new, all zeros, for 3 classes; the weights had 7 classes" in err
    assert "64x96 pixels, 3 classes" in out
    assert am.load_model(target).config.image_size == (64, 96)
    flags = ("--image-size", "64", "--resize-weights", "resample")
    _, _, err = mixer(capsys, "convert", PARAMS, tmp_path / "other.npz", *flags)
    assert "resampled (nearest)" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x.pth", "format allmlp is a .safetensors file, got 'x.pth'"),
        ("x.NPZ", "Call it x.safetensors"),
        ("x --image-size 60", "the nearest that is: 64x64"),
        ("x --image-size 800000", "GiB, the machine has"),
        ("x --resize-weights resample", "resize_weights needs image_size"),
        ("x --num-classes -3", "at least 0, got -3"),
    ],
)
def test_mistakes(capsys, tmp_path: Path, monkeypatch, line: str, message: str):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, tmp_path, "convert", PARAMS, *line.split())


def test_inspect(capsys, tmp_path: Path):
    out, _ = ran(capsys, "models", "--inspect", PARAMS)
    assert "3 layers, patch 8, 24 channels, 32x32 pixels, 7 classes" in out
    row = ["MixerBlock_{0..2}/token_mixing/Dense_0/kernel", "16x12", "float32"]
    assert row in [line.split() for line in out.splitlines()]
    model = am.load_model(PARAMS, 64, quiet=True)
    path = am.save_model(model, tmp_path / "grown.safetensors")
    state = {**model.state_dict(), "stem.bias": torch.zeros(3)}
    safetensors.torch.save_file(state, path)
    code, out, _ = mixer(capsys, "models", "--inspect", path)
    assert code == 0  # what is in it can still be read
    assert "not a model    the tensors do not fit" in out
    assert "stem.bias is (3,), the architecture wants (24,)" in out
