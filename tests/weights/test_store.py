"""Models to and from files: the same bits back, and a clear refusal of everything else."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mlp_mixer as mm
from conftest import tiny_model
from mlp_mixer.models.layers import classes_of, preprocessing_of
from mlp_mixer.weights import store


def saved(tmp_path: Path, **changes: object) -> tuple[mm.ImageClassifier, Path]:
    model = tiny_model(num_classes=3, **changes)
    model.class_names = ["ant", "bee", "cat"]
    model.preprocessing = mm.Preprocessing(image_size=(8, 8), resize="squash", std=0.25)
    folder = tmp_path / "model"
    mm.save_model(model, folder)
    return model, folder


def assert_same_model(first: mm.ImageClassifier, second: mm.ImageClassifier) -> None:
    assert first.config == second.config
    assert first.class_names == second.class_names
    assert first.preprocessing == second.preprocessing
    for (name, a), (other, b) in zip(
        first.state_dict().items(), second.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)


def test_folder_round_trip(tmp_path: Path):
    model, folder = saved(tmp_path, gelu="exact", stochastic_depth=0.1)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = mm.load_model(folder)
    assert_same_model(loaded, model)
    assert not loaded.training
    described = json.loads((folder / "config.json").read_text())
    assert described["class_names"] == ["ant", "bee", "cat"]
    assert described["architecture"]["gelu"] == "exact"
    assert described["preprocessing"]["std"] == 0.25


def test_a_file_that_travels_alone(tmp_path: Path):
    model, _ = saved(tmp_path)
    path = mm.save_model(model, tmp_path / "new" / "alone.safetensors")
    assert_same_model(mm.load_model(path), model)
    assert_same_model(mm.load_model(str(path)), model)


def test_a_foreign_header_uses_the_config_beside(tmp_path: Path):
    model, folder = saved(tmp_path)
    safetensors.torch.save_file(dict(model.state_dict()), folder / "model.safetensors")
    assert_same_model(mm.load_model(folder), model)
    (folder / "config.json").unlink()
    with pytest.raises(mm.UserError, match=r"no config\.json lies beside it"):
        mm.load_model(folder)


def test_a_run_folder_means_its_best(trained: mm.TrainResult):
    model = mm.load_model(trained.run_folder)
    assert_same_model(model, mm.load_model(trained.run_folder / "best"))
    assert model.class_names == [str(digit) for digit in range(10)]


def test_another_class_count_puts_a_zero_head(tmp_path: Path):
    model, folder = saved(tmp_path)
    loaded = mm.load_model(folder, num_classes=5)
    images = torch.randn(2, 3, 8, 8)
    assert loaded.config.num_classes == 5
    assert loaded.class_names is None
    assert loaded.preprocessing == model.preprocessing
    assert torch.equal(loaded(images), torch.zeros(2, 5))
    assert torch.equal(loaded.features(images), model.eval().features(images))
    assert mm.load_model(folder, num_classes=0)(images).shape == (2, 16)
    assert mm.load_model(folder, num_classes=3).class_names == ["ant", "bee", "cat"]


def test_another_image_size_is_refused(tmp_path: Path):
    _, folder = saved(tmp_path)
    assert mm.load_model(folder, image_size=8).config.image_size == (8, 8)
    with pytest.raises(mm.UserError, match="trained at 8x8 pixels, asked for 16x16"):
        mm.load_model(folder, image_size=16)


@pytest.mark.parametrize(
    "damage",
    ["truncated", "empty", "huge header", "html", "pickle", "text"],
)
def test_damaged_files_are_one_clear_error(tmp_path: Path, damage: str):
    _, folder = saved(tmp_path)
    path, marker = folder / "model.safetensors", tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {marker}",)

    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "huge header": b"\xff\xff\xff\xff\xff\xff\x00\x00" + content[8:],
            "html": b"<!doctype html><title>404 not found</title>",
            "pickle": pickle.dumps(Evil()),
            "text": b"hello",
        }[damage]
    )
    with pytest.raises(mm.UserError, match="not a whole safetensors file") as caught:
        mm.load_model(folder)
    assert str(path) in str(caught.value)
    assert not marker.exists()


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path):
    model, folder = saved(tmp_path)
    state = dict(model.state_dict())
    state["stem.weights"] = state.pop("stem.weight")
    state["head.weight"] = torch.zeros(4, 16)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(mm.UserError) as caught:
        mm.load_model(folder)
    message = str(caught.value)
    assert "missing: stem.weight (16, 3, 4, 4)" in message
    assert "extra: stem.weights (16, 3, 4, 4)" in message
    assert "misshapen: head.weight is (4, 16), the architecture wants (3, 16)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "written by a newer mlp_mixer"),
        ({"architecture": None}, "not a model description"),
        ({"architecture": {"family": "mixer"}}, "not a mixer architecture"),
        ({"preprocessing": {"image_size": [8, 8], "resize": "zoom"}}, "not a preprocessing"),
        ({"preprocessing": {"image_size": 8}}, "not a preprocessing"),
        ({"preprocessing": {"image_size": [8, 8], "mean": "x"}}, "not a preprocessing"),
        ({"preprocessing": {"image_size": [8, 16]}}, "the preprocessing gives"),
        ({"class_names": ["ant", "bee"]}, "there are 2 class names for 3 classes"),
        ({"class_names": 5}, "class_names must be a list of names, got 5"),
    ],
)
def test_a_description_that_does_not_fit(tmp_path: Path, change: dict[str, object], message: str):
    model, folder = saved(tmp_path)
    described = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps(described))
    safetensors.torch.save_file(dict(model.state_dict()), folder / "model.safetensors")
    with pytest.raises(mm.UserError, match=message):
        mm.load_model(folder)


def test_config_json_is_what_counts_for_a_folder(tmp_path: Path):
    """A class that is renamed by hand in config.json is renamed; others describe themselves."""
    model, folder = saved(tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"bee"', '"wasp"'))
    assert mm.load_model(folder).class_names == ["ant", "wasp", "cat"]
    mm.save_model(model, folder / "other.safetensors")
    assert mm.load_model(folder / "other.safetensors").class_names == ["ant", "bee", "cat"]


def test_loading_draws_no_random_numbers(tmp_path: Path):
    _, folder = saved(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = mm.load_model(folder, num_classes=9)
    assert torch.equal(torch.rand(1), expected)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    model(torch.zeros(1, 3, 8, 8)).sum().backward()


def test_broken_json(tmp_path: Path):
    model, folder = saved(tmp_path)
    (folder / "config.json").write_text("{")
    safetensors.torch.save_file(dict(model.state_dict()), folder / "model.safetensors")
    with pytest.raises(mm.UserError, match="not a model description"):
        mm.load_model(folder)


def test_nothing_there(tmp_path: Path):
    with pytest.raises(mm.UserError, match=r"no such model: '.*nowhere'"):
        mm.load_model(tmp_path / "nowhere")
    with pytest.raises(mm.UserError, match="the folder has no weights"):
        mm.load_model(tmp_path)


def test_an_unknown_format(tmp_path: Path):
    with pytest.raises(mm.UserError, match=r"unknown format 'onnx'[\s\S]*Known: mlp_mixer"):
        mm.save_model(tiny_model(), tmp_path / "x", format="onnx")
    assert not (tmp_path / "x").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk fills up in the middle: the model that was there stays whole."""
    model, folder = saved(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(mm.UserError, match="cannot write the model: No space left on device"):
        mm.save_model(tiny_model(num_classes=3, num_blocks=1), folder)
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_model(mm.load_model(folder), model)


def test_what_a_model_carries():
    model = tiny_model(num_classes=2)
    with pytest.raises(mm.UserError, match="carries no class names"):
        classes_of(model)
    assert preprocessing_of(model) == mm.Preprocessing(image_size=(8, 8))
    assert re.match(r"images have 1 .*or 3", str(_error_of_two_channels()))


def _error_of_two_channels() -> ValueError:
    with pytest.raises(ValueError, match="got 2") as caught:
        mm.Preprocessing(image_size=(8, 8), channels=2)
    return caught.value
