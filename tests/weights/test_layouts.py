"""The files of Google, timm, and CycleMLP's and Vision Permutator's authors: the same bits in and
out, and what they do not say."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import allmlp as am
from allmlp.models.catalog import family_of
from allmlp.models.resmlp import FAMILY as RESMLP
from allmlp.weights.layouts import GOOGLE
from allmlp.weights.report import inspect_file
from conftest import GOLDEN, tiny_model
from staged_models import enliven

PARAMS, TIMM = GOLDEN / "official_tiny_params.npz", GOLDEN / "timm_tiny.safetensors"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def assert_same_tensors(path: Path, expected: Path) -> None:
    found, wanted = (am.load_model(p, quiet=True).state_dict() for p in (path, expected))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


# --- Google ---------------------------------------------------------------------------------------


@pytest.mark.numerics
def test_googles_golden_file(tmp_path: Path):
    model = am.load_model(PARAMS)
    with np.load(GOLDEN / "official_tiny_io.npz") as io:
        images = torch.from_numpy(io["images_nhwc"]).permute(0, 3, 1, 2)
        assert (model(images) - torch.from_numpy(io["logits"])).abs().max() <= 1e-5
    assert (model.config.gelu, model.config.num_blocks) == ("tanh", 3)
    assert model.preprocessing == am.Preprocessing(image_size=(32, 32))
    before = arrays_of(PARAMS)
    after = arrays_of(am.save_model(model, tmp_path / "out.npz", format="google"))
    assert set(before) == set(after)
    for key, value in before.items():
        assert (after[key].dtype, after[key].shape) == (value.dtype, value.shape)
        assert after[key].tobytes() == value.tobytes()


@pytest.mark.parametrize("prefix", ["params/", "opt/target/"])
def test_trees_of_flax(tmp_path: Path, prefix: str):
    tree = {f"{prefix}{key}": value for key, value in arrays_of(PARAMS).items()}
    np.savez(tmp_path / "tree.npz", **tree, **{"opt/state/step": np.array(3)})
    assert_same_tensors(tmp_path / "tree.npz", PARAMS)


def test_bfloat16_and_other_byte_and_axis_orders(tmp_path: Path):
    arrays = arrays_of(PARAMS)
    turned = {key: np.asfortranarray(value.astype(">f4")) for key, value in arrays.items()}
    np.savez_compressed(tmp_path / "big.npz", **turned)
    assert_same_tensors(tmp_path / "big.npz", PARAMS)
    halves = {key: torch.from_numpy(value).bfloat16() for key, value in arrays.items()}
    half = {key: value.view(torch.int16).numpy().view("V2") for key, value in halves.items()}
    np.savez(tmp_path / "half.npz", **half)
    found = GOOGLE.from_ours(am.load_model(tmp_path / "half.npz").state_dict())
    assert all(torch.equal(found[key], value.float()) for key, value in halves.items())


def test_what_googles_layout_has_no_place_for_lies_beside_it(tmp_path: Path):
    model = tiny_model(["ant", "bee"], gelu="exact", image_size=(8, 16), num_blocks=11).eval()
    model.preprocessing = am.Preprocessing(image_size=(8, 16), mean=0.0, std=1.0)
    path = am.save_model(model, tmp_path / "mine.npz", format="google")
    blocks = [key.split("/")[0] for key in arrays_of(path) if "token_mixing/Dense_0/kernel" in key]
    assert blocks == [f"MixerBlock_{number}" for number in range(11)]
    loaded = am.load_model(path)
    assert loaded.config == model.config
    assert (loaded.class_names, loaded.preprocessing) == (model.class_names, model.preprocessing)
    other = am.save_model(tiny_model(num_classes=2, num_blocks=1), tmp_path / "b.npz", "google")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())  # another file of this name: the .json is not its own
    loaded = am.load_model(path)
    assert (loaded.class_names, loaded.config.gelu) == (None, "tanh")
    path.write_bytes(content)
    (tmp_path / "mine.json").unlink()
    with pytest.raises(am.UserError, match="8 patches of 4x4 pixels"):
        am.load_model(path)
    assert am.load_model(path, image_size=(8, 16)).config.image_size == (8, 16)


def test_what_does_not_fit_is_named_as_in_the_file(tmp_path: Path):
    arrays, path = arrays_of(PARAMS), tmp_path / "odd.npz"
    arrays["MixerBlock_1/LayerNorm_0/gamma"] = arrays.pop("MixerBlock_1/LayerNorm_0/scale")
    arrays["MixerBlock_2/token_mixing/Dense_0/kernel"] = np.zeros((64, 12), np.float32)
    np.savez(path, **arrays)
    with pytest.raises(am.UserError) as caught:
        am.load_model(path)
    message = str(caught.value)
    assert caught.value.code == "shapes"
    assert "missing: MixerBlock_1/LayerNorm_0/scale (24,)" in message
    assert "extra: MixerBlock_1/LayerNorm_0/gamma (24,)" in message
    assert "misshapen: MixerBlock_2/token_mixing/Dense_0/kernel is (64, 12)" in message
    assert str(path) in message
    del arrays["stem/kernel"]
    np.savez(path, **arrays)
    with pytest.raises(am.UserError, match="Google, but stem/kernel is missing"):
        am.load_model(path)
    for names in (["weights"], ["norm.weight", "blocks.0.norm1.weight", "patch_embed.proj.weight"]):
        np.savez(path, **{name: np.zeros(3, np.float32) for name in names})
        with pytest.raises(am.UserError, match=rf"none of the {len(names)} tensors .*weight"):
            am.load_model(path)


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.numerics
def test_timms_golden_file(tmp_path: Path):
    model = am.load_model(TIMM)
    assert model.config.gelu == "exact"
    with np.load(GOLDEN / "timm_tiny_io.npz") as io:
        images = torch.from_numpy(io["images_nchw"])
        assert (model(images) - torch.from_numpy(io["logits"])).abs().max() <= 1e-5
        assert (model.features(images) - torch.from_numpy(io["pre_logits"])).abs().max() <= 1e-5
    path = am.save_model(model, tmp_path / "out.safetensors", format="timm")
    before, after = safetensors.torch.load_file(TIMM), safetensors.torch.load_file(path)
    assert set(before) == set(after)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["resmlp", "gmlp", "gmixer"])
def test_timms_other_families(tmp_path: Path, family: str):
    """Logits, features and every gradient equal timm's; and back to the same file."""
    path = GOLDEN / f"timm_tiny_{family}.safetensors"
    model = am.load_model(path, quiet=True)
    with np.load(GOLDEN / f"timm_tiny_{family}_io.npz") as io:
        golden = {name: torch.from_numpy(io[name]) for name in io.files}
    images = golden["images"].requires_grad_()
    logits = model(images)
    assert (logits - golden["logits"]).abs().max() <= 1e-5
    assert (model.features(images) - golden["features"]).abs().max() <= 1e-5
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2, 1])).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    names = family_of(model.config).names[0]
    gradients = {f"grad/{name}": value for name, value in names.from_ours(found).items()}
    gradients["images_grad"] = images.grad
    assert gradients.keys() | {"images", "logits", "features"} == golden.keys()
    for name, gradient in gradients.items():
        limit = 1e-5 * max(1, golden[name].abs().max())
        assert (gradient - golden[name]).abs().max() <= limit, name
    saved = am.save_model(model, tmp_path / "out.safetensors", format="timm")
    before, after = safetensors.torch.load_file(path), safetensors.torch.load_file(saved)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.numerics
def test_files_of_resmlps_authors(tmp_path: Path):
    golden = GOLDEN / "timm_tiny_resmlp.safetensors"
    model = am.load_model(golden, quiet=True)
    state = RESMLP.names[1].from_ours(model.state_dict())
    assert {"patch_embed.proj.weight", "blocks.1.gamma_1", "blocks.0.attn.weight"} <= state.keys()
    assert state["blocks.0.norm1.alpha"].shape == (8,)
    torch.save({"model": state}, tmp_path / "resmlp.pth")
    loaded = am.load_model(tmp_path / "resmlp.pth", quiet=True)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model(images))
    assert loaded.preprocessing.interpolation == "bicubic"
    bare = tmp_path / "bare.pth"
    torch.save(model.state_dict(), bare)
    assert torch.equal(am.load_model(bare, quiet=True)(images), model(images))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", ["state_dict", "model", "compiled", "averaged"])
def test_pth_files(tmp_path: Path, kind: str, old: bool):
    state = safetensors.torch.load_file(TIMM)
    content = {
        "state_dict": {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        "model": {"model": state, "optimizer": {"state": {}, "step": torch.zeros(3)}},
        "compiled": {f"_orig_mod.module.{name}": value for name, value in state.items()},
        "averaged": {  # torch.optim.swa_utils.AveragedModel
            "n_averaged": torch.tensor(3),
            **{f"module.{name}": value for name, value in state.items()},
        },
    }[kind]
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    assert_same_tensors(path, TIMM)


def test_weights_beside_their_ema_are_named(tmp_path: Path, capsys):
    state = safetensors.torch.load_file(TIMM)
    averages = {name: value + 1 for name, value in state.items()}
    content = {"state_dict": state, "state_dict_ema": averages, "ema_decay": 0.99}
    torch.save(content, tmp_path / "w.pth")
    model = am.load_model(tmp_path / "w.pth")
    assert torch.equal(model.head.bias, state["head.bias"])
    assert "of state_dict, not state_dict_ema" in capsys.readouterr().err
    assert "of state_dict, not state_dict_ema" in inspect_file(tmp_path / "w.pth")[1]


def timm_folder(folder: Path, **changes: object) -> Path:
    """A model as the hub has it: model.safetensors and timm's config.json."""
    settings = {
        "input_size": [3, 32, 32],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        **changes,
    }
    shutil.copy(TIMM, folder / "model.safetensors")
    config = {"architecture": "mixer_b16_224", "num_classes": 7, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("settings", "expected", "note"),
    [
        ({}, {}, ""),
        ({"crop_mode": "squash"}, {"resize": "resize-crop"}, ""),
        ({"crop_mode": "border"}, {}, "'border'"),
        ({"interpolation": "lanczos"}, {"interpolation": "bicubic"}, "'lanczos'"),
        (
            {"interpolation": None, "crop_pct": None},
            {"interpolation": "bicubic", "crop": 0.875},
            "",
        ),
        ({"mean": [0.1, 0.2, 0.3], "std": [0.2] * 3}, {"mean": (0.1, 0.2, 0.3), "std": 0.2}, ""),
    ],
)
def test_timms_preprocessing(tmp_path: Path, capsys: Any, settings: Any, expected: Any, note: str):
    preprocessing = am.load_model(timm_folder(tmp_path, **settings)).preprocessing
    whole = {"mean": 0.0, "std": 1.0, "crop": 0.9, **expected}
    assert preprocessing == am.Preprocessing(image_size=(32, 32), **whole)
    err = capsys.readouterr().err
    assert note in err
    assert bool(err) == bool(note)


def test_timms_class_names(tmp_path: Path):
    names = ["a", "b", "c", "d", "e", "f", "g"]
    assert am.load_model(timm_folder(tmp_path, label_names=names)).class_names == names
    config = json.loads((timm_folder(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "label_names": names[::-1]}))
    assert am.load_model(tmp_path).class_names == names[::-1]
    with pytest.raises(am.UserError, match="std must be above 0"):
        am.load_model(timm_folder(tmp_path, std=[0, 0, 0]))
    # A .pth in a folder of somebody else's model describes itself.
    torch.save(safetensors.torch.load_file(TIMM), tmp_path / "other.pth")
    model = am.load_model(tmp_path / "other.pth", quiet=True)
    assert model.preprocessing == am.Preprocessing(image_size=(32, 32))


@pytest.mark.parametrize(("size", "channels"), [((8, 32), 3), ((16, 16), 1)])
def test_rectangles_are_as_timm_says(tmp_path: Path, size: tuple[int, int], channels: int):
    """2 x 8 patches are as many as 4 x 4; a grey model takes the mean of timm's numbers."""
    model = tiny_model(image_size=size, in_channels=channels, gelu="exact").eval()
    path = am.save_model(model, tmp_path / "model.safetensors", format="timm")
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)  # without our description
    settings = {"input_size": [channels, *size], "mean": [0.3, 0.6, 0.9], "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": settings}))
    loaded = am.load_model(tmp_path)
    assert loaded.config.image_size == size
    assert np.mean(loaded.preprocessing.mean) == pytest.approx(0.6)


# --- CycleMLP and Vision Permutator ---------------------------------------------------------------


def published(family: str, num_classes: int = 7, **changes: Any) -> am.ImageClassifier:
    """A small one as its authors would publish it: 224 pixels, segments as many as rows."""
    torch.manual_seed(0)
    if family == "cycle":
        shape = {"depths": (1, 2), "dims": (8, 12), "mlp_ratios": (4, 2), "stem_stride": 4}
        return enliven(am.create_model("cycle_mlp_b1", 224, num_classes, **{**shape, **changes}))
    shape = {"patch_size": 56, "depths": (1, 1, 2), "dims": (8, 8, 12), "mlp_ratios": (3, 3, 2)}
    shape |= {"segments": (4, 4, 2), "downsamples": (False, True)}
    return enliven(am.create_model("vip_s7", 224, num_classes, **{**shape, **changes}))


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["cycle", "permutator"])
def test_the_authors_files(tmp_path: Path, family: str, capsys: Any):
    model, images = published(family).eval(), torch.randn(2, 3, 224, 224)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    loaded = am.load_model(tmp_path / "weights.pth")
    assert loaded.config == model.config
    assert torch.equal(loaded(images), model(images))
    wanted = am.Preprocessing(image_size=(224, 224), interpolation="bicubic", **IMAGENET)
    assert loaded.preprocessing == wanted
    title = {"cycle": "CycleMLP", "permutator": "Vision Permutator"}[family]
    assert f"{title}'s authors is assumed" in capsys.readouterr().err
    for channels in (1, 5):  # a grey one takes the mean, others have no preprocessing
        model = published(family, num_classes=0, in_channels=channels).eval()
        safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
        loaded = am.load_model(tmp_path / "weights.safetensors", quiet=True)
        assert loaded.config == model.config
        found = loaded.preprocessing
        assert found is None if channels == 5 else found and found.mean == pytest.approx(0.449)


@pytest.mark.parametrize("value", [-1.0, 0.5, 1e9])
def test_other_offsets_in_a_file_are_an_error(tmp_path: Path, value: float):
    tensors = dict(published("cycle").state_dict())
    tensors["network.0.0.attn.sfc_h.offset"] = torch.full((1, 16, 1, 1), value)
    torch.save({"model": tensors}, tmp_path / "other.pth")
    with pytest.raises(am.UserError, match=r"other shifts[\s\S]*other.pth"):
        am.load_model(tmp_path / "other.pth", quiet=True)


def test_shapes_that_do_not_say_enough(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    wide = am.load_model(am.save_model(published("permutator"), tmp_path / "m"), 448, quiet=True)
    many = published("cycle").state_dict() | {
        f"network.{name}.mlp.fc1.weight": torch.zeros(4, 4) for name in ("999999.0", "0.99999")
    }
    for tensors, message in (
        (published("cycle", stem_kernel=5).state_dict(), "window is 5 pixels wide"),
        (wide.state_dict(), "16x16 weights at 8 channels"),
        (many, "block 99,999"),
    ):
        safetensors.torch.save_file(tensors, path)
        with pytest.raises(am.UserError, match=message):
            am.load_model(path, quiet=True)


@pytest.mark.parametrize("file", ["x.npz", "x.safetensors"])
@pytest.mark.parametrize("family", ["cycle", "variant"])
def test_formats_of_others_have_no_place(tmp_path: Path, family: str, file: str):
    model = tiny_model(pyramid=((1, 2),)) if family == "variant" else published(family)
    format = "google" if file == "x.npz" else "timm"
    with pytest.raises(am.UserError, match=f"'{format}'"):
        am.save_model(model, tmp_path / file, format=format)
    assert not list(tmp_path.iterdir())
