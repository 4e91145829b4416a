"""Models to and from files: the same bits back, and a clear refusal of everything else."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

import allmlp as am
from allmlp import io
from allmlp.io import partial_path
from allmlp.models.layers import classes_of, preprocessing_of
from conftest import NO_PROCESS, tiny_model


def saved(tmp_path: Path, **changes: object) -> tuple[am.ImageClassifier, Path]:
    model = tiny_model(num_classes=3, **changes)
    model.class_names = ["ant", "bee", "cat"]
    model.preprocessing = am.Preprocessing(image_size=(8, 8), resize="squash", std=0.25)
    folder = tmp_path / "model"
    am.save_model(model, folder)
    return model, folder


def assert_same_model(first: am.ImageClassifier, second: am.ImageClassifier) -> None:
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
    loaded = am.load_model(folder)
    assert_same_model(loaded, model)
    assert not loaded.training
    described = json.loads((folder / "config.json").read_text())
    assert described["class_names"] == ["ant", "bee", "cat"]
    assert described["architecture"]["gelu"] == "exact"
    assert described["preprocessing"]["std"] == 0.25


def test_a_file_that_travels_alone(tmp_path: Path):
    model, _ = saved(tmp_path)
    path = am.save_model(model, tmp_path / "new" / "alone.safetensors")
    assert_same_model(am.load_model(path), model)
    assert_same_model(am.load_model(str(path)), model)


def test_a_foreign_header_uses_the_config_beside(tmp_path: Path):
    model, folder = saved(tmp_path)
    safetensors.torch.save_file(dict(model.state_dict()), folder / "model.safetensors")
    assert_same_model(am.load_model(folder), model)


def test_without_any_description_the_tensors_say_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, folder = saved(tmp_path)
    safetensors.torch.save_file(dict(model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").unlink()
    loaded = am.load_model(folder)
    assert loaded.config == model.config
    assert loaded.class_names is None
    assert loaded.preprocessing == am.Preprocessing(image_size=(8, 8))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "does not say its preprocessing; Google's is assumed" in captured.err
    am.load_model(folder, quiet=True)
    assert capsys.readouterr().err == ""


def test_a_run_folder_means_its_best(trained: am.TrainResult):
    model = am.load_model(trained.run_folder)
    assert_same_model(model, am.load_model(trained.run_folder / "best"))
    assert model.class_names == [str(digit) for digit in range(10)]


def test_another_class_count_puts_a_zero_head(tmp_path: Path):
    model, folder = saved(tmp_path)
    loaded = am.load_model(folder, num_classes=5)
    images = torch.randn(2, 3, 8, 8)
    assert loaded.config.num_classes == 5
    assert loaded.class_names is None
    assert loaded.preprocessing == model.preprocessing
    assert torch.equal(loaded(images), torch.zeros(2, 5))
    assert torch.equal(loaded.features(images), model.eval().features(images))
    assert am.load_model(folder, num_classes=0)(images).shape == (2, 16)
    assert am.load_model(folder, num_classes=3).class_names == ["ant", "bee", "cat"]


def test_another_image_size_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, folder = saved(tmp_path)
    assert am.load_model(folder, image_size=8).config.image_size == (8, 8)
    assert capsys.readouterr().err == ""
    grown = am.load_model(folder, image_size=(16, 24))
    assert grown.config.image_size == (16, 24)
    assert grown.preprocessing == am.Preprocessing(image_size=(16, 24), resize="squash", std=0.25)
    assert grown.class_names == ["ant", "bee", "cat"]
    assert "8x8 -> 16x24 pixels: block-diagonal, 2x3 tiles" in capsys.readouterr().err
    am.load_model(folder, image_size=12)
    assert "8x8 -> 12x12 pixels: resampled" in capsys.readouterr().err
    am.load_model(folder, image_size=16, resize_weights="resample")
    assert "8x8 -> 16x16 pixels: resampled" in capsys.readouterr().err
    with pytest.raises(am.UserError, match=r"not divisible by the patch size 4.*12x12"):
        am.load_model(folder, image_size=11)
    for wrong in ("16", -8, (8, 8, 8), (8, 0), (8.0, 8)):
        with pytest.raises(am.UserError, match="not an image size"):
            am.load_model(folder, image_size=wrong)


@pytest.mark.parametrize(
    "damage",
    ["truncated", "huge header"],
)
def test_damaged_files_are_one_clear_error(tmp_path: Path, damage: str):
    _, folder = saved(tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "huge header": b"\xff\xff\xff\xff\xff\xff\x00\x00" + content[8:],
        }[damage]
    )
    with pytest.raises(am.UserError, match="not a whole safetensors file") as caught:
        am.load_model(folder)
    assert str(path) in str(caught.value)


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path):
    model, folder = saved(tmp_path)
    state = dict(model.state_dict())
    state["stem.weights"] = state.pop("stem.weight")
    state["head.weight"] = torch.zeros(4, 16)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(am.UserError) as caught:
        am.load_model(folder)
    message = str(caught.value)
    assert "missing: stem.weight (16, 3, 4, 4)" in message
    assert "extra: stem.weights (16, 3, 4, 4)" in message
    assert "misshapen: head.weight is (4, 16), the architecture wants (3, 16)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "written by a newer allmlp"),
        ({"architecture": None}, "not a model description"),
        ({"architecture": {"family": "mixer"}}, "not a mixer architecture"),
        ({"preprocessing": {"image_size": [8, 8], "resize": "zoom"}}, "not a preprocessing"),
        ({"preprocessing": {"image_size": 8}}, "not a preprocessing"),
        ({"preprocessing": {"image_size": [8, 8], "mean": "x"}}, "not a preprocessing"),
        ({"preprocessing": {"image_size": [8, 16]}}, "the preprocessing gives"),
        ({"class_names": ["ant", "bee"]}, "there are 2 class names for 3 classes"),
        ({"class_names": 5}, "class names are a list of text, got 5"),
    ],
)
def test_a_description_that_does_not_fit(tmp_path: Path, change: dict[str, object], message: str):
    model, folder = saved(tmp_path)
    described = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps(described))
    safetensors.torch.save_file(dict(model.state_dict()), folder / "model.safetensors")
    with pytest.raises(am.UserError, match=message):
        am.load_model(folder)


def test_config_json_is_what_counts_for_a_folder(tmp_path: Path):
    """A class that is renamed by hand in config.json is renamed; others describe themselves."""
    model, folder = saved(tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"bee"', '"wasp"'))
    assert am.load_model(folder).class_names == ["ant", "wasp", "cat"]
    am.save_model(model, folder / "other.safetensors")
    assert am.load_model(folder / "other.safetensors").class_names == ["ant", "bee", "cat"]


def test_loading_draws_no_random_numbers(tmp_path: Path):
    _, folder = saved(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = am.load_model(folder, num_classes=9)
    assert torch.equal(torch.rand(1), expected)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    model(torch.zeros(1, 3, 8, 8)).sum().backward()


def test_broken_json(tmp_path: Path):
    model, folder = saved(tmp_path)
    (folder / "config.json").write_text("{")
    safetensors.torch.save_file(dict(model.state_dict()), folder / "model.safetensors")
    with pytest.raises(am.UserError, match="not a model description"):
        am.load_model(folder)


def test_nothing_there(tmp_path: Path):
    with pytest.raises(am.UserError, match=r"no such model: '.*nowhere'"):
        am.load_model(tmp_path / "nowhere")
    with pytest.raises(am.UserError, match="the folder has no weights"):
        am.load_model(tmp_path)


def test_an_unknown_format(tmp_path: Path):
    with pytest.raises(
        am.UserError, match=r"unknown format 'onnx'[\s\S]*Known: allmlp, google, timm"
    ):
        am.save_model(tiny_model(), tmp_path / "x", format="onnx")
    assert not (tmp_path / "x").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk fills up in the middle: the model that was there stays whole."""
    model, folder = saved(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(am.UserError, match="cannot write the model: No space left on device"):
        am.save_model(tiny_model(num_classes=3, num_blocks=1), folder, overwrite=True)
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_model(am.load_model(folder), model)


def test_what_a_model_carries():
    model = tiny_model(num_classes=2)
    with pytest.raises(am.UserError, match="carries no class names"):
        classes_of(model)
    assert preprocessing_of(model) == am.Preprocessing(image_size=(8, 8))
    assert re.match(r"images have 1 .*or 3", str(_error_of_two_channels()))


def test_a_new_head_is_not_used_by_accident(
    tmp_path: Path, trained: am.TrainResult, capsys: pytest.CaptureFixture[str]
):
    model = am.load_model(trained.run_folder, num_classes=12)
    assert "new, all zeros, for 12 classes; the weights had 10" in capsys.readouterr().err
    with pytest.raises(am.UserError, match=r"the head for 12 classes is new \(all zeros\)"):
        am.evaluate(model, "digits:test")
    path = am.save_model(model, tmp_path / "new.safetensors")
    with pytest.raises(am.UserError, match=r"the head for 12 classes is new \(all zeros\)"):
        am.predict(path, "digits:test")
    with pytest.raises(am.UserError, match="the model has no head"):
        am.predict(am.load_model(trained.run_folder, num_classes=0), "digits:test")
    with pytest.raises(am.UserError, match="num_classes must be at least 0, got -1"):
        am.load_model(trained.run_folder, num_classes=-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_float32_in_memory(tmp_path: Path, dtype: torch.dtype):
    model, folder = saved(tmp_path)
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    loaded = am.load_model(folder)
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].float())


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("format", ["allmlp", "google"])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, bad: str, format: str):
    model, path = tiny_model(), tmp_path / ("m.npz" if format == "google" else "m.safetensors")
    weight = model.blocks[1].channel_mixing.dense_0.weight
    weight.data[0] = 3e38  # a number, as the infinite sum is not
    am.save_model(model, path, format)
    assert am.load_model(path, quiet=True).state_dict().keys() == model.state_dict().keys()
    weight.data[1, :2] = float(bad)
    am.save_model(model, path, format, overwrite=True)
    with pytest.raises(am.UserError, match=r"blocks.1.*weight holds NaN or infinity: 2 of its"):
        am.load_model(path, quiet=True)


def test_the_file_may_change_after_loading(tmp_path: Path):
    """What `cp other model.safetensors` does: it empties the file under us."""
    model, folder = saved(tmp_path)
    pickled = tmp_path / "weights.pth"
    torch.save(model.state_dict(), pickled)
    for path in (folder / "model.safetensors", pickled):
        loaded = am.load_model(path, quiet=True)
        with path.open("rb+") as file:
            file.truncate(100)
        assert torch.equal(loaded.stem.weight, model.stem.weight)
        assert loaded(torch.zeros(1, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("format", ["allmlp", "timm", "google"])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_weights_and_description_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, failing: int
):
    first, _ = saved(tmp_path, gelu="exact")
    target = tmp_path / ("x.npz" if format == "google" else "x")
    am.save_model(first, target, format)
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full)
    second = tiny_model(num_classes=3, hidden_dim=8)
    second.class_names = ["x", "y", "z"]
    with pytest.raises(am.UserError, match="No space left on device"):
        am.save_model(second, target, format, overwrite=True)
    calls.clear()
    with pytest.raises(am.UserError, match="No space left on device"):
        am.save_model(second, tmp_path / f"new{target.suffix}", format)
    monkeypatch.undo()
    assert_same_model(am.load_model(target), first)
    assert not [each for each in tmp_path.rglob("*") if each.is_file() and "new" in str(each)]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_save_killed_between_its_renames_is_seen(tmp_path: Path):
    """New weights beside the old description: the header, which is of the new ones, counts."""
    _, folder = saved(tmp_path)
    old = (folder / "config.json").read_bytes()
    second = tiny_model(num_classes=3, gelu="exact").eval()
    second.class_names = ["x", "y", "z"]
    with torch.no_grad():
        second.head.bias.add_(1)
    am.save_model(second, folder, overwrite=True)
    (folder / "config.json").write_bytes(old)
    assert_same_model(am.load_model(folder), second)


def test_a_run_folder_is_not_overwritten(tmp_path: Path, trained: am.TrainResult):
    config = (trained.run_folder / "config.json").read_bytes()
    with pytest.raises(am.UserError, match="the output is a run folder; its model lies in best/"):
        am.save_model(tiny_model(), trained.run_folder)
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(am.UserError, match="it is not the description of a model"):
        am.save_model(tiny_model(), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == config


def test_files_can_be_read_by_whom_the_umask_says(tmp_path: Path):
    _, folder = saved(tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    (tmp_path / "plain").touch()
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_leftovers_of_killed_saves_go(tmp_path: Path):
    model, folder = saved(tmp_path)
    pids = (NO_PROCESS, os.getppid())
    dead, living = (partial_path(folder / "model.safetensors", pid) for pid in pids)
    for path in (dead, living):
        path.write_bytes(b"half")
    with pytest.raises(am.UserError, match="there already"):
        am.save_model(model, folder)
    am.save_model(model, folder, overwrite=True)
    assert not dead.exists()
    assert living.exists()  # it may be writing


def test_odd_places(tmp_path: Path):
    for source in ("~nosuchuser/x", "x" * 300, "~nosuchuser/x.npz"):
        with pytest.raises(am.UserError):
            am.load_model(source)
    with pytest.raises(am.UserError, match="~ cannot be resolved"):
        am.save_model(tiny_model(), "~nosuchuser/x")
    with pytest.raises(am.UserError, match="Call it x.safetensors"):
        am.save_model(tiny_model(), tmp_path / "x.safetensor")
    with pytest.raises(am.UserError, match="not valid UTF-8"):
        am.save_model(tiny_model(), tmp_path / "caf\udce9")
    with pytest.raises(am.UserError, match="needs [0-9,]+ GiB"):
        am.load_model(am.save_model(tiny_model(), tmp_path / "x"), num_classes=10**12)
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_integers_are_no_weights(tmp_path: Path):
    model, folder = saved(tmp_path)
    state = {**model.state_dict(), "stem.bias": torch.zeros(16, dtype=torch.int64)}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(am.UserError, match=r"not floating point: stem\.bias is int64"):
        am.load_model(folder)


def _error_of_two_channels() -> ValueError:
    with pytest.raises(ValueError, match="got 2") as caught:
        am.Preprocessing(image_size=(8, 8), channels=2)
    return caught.value
