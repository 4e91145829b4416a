"""The authors' files of CycleMLP and Vision Permutator: containers, shapes, names, refusals."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import allmlp as am
from allmlp.weights import checkpoints, download
from allmlp.weights.checkpoints import CHECKPOINTS
from conftest import mixer
from staged_models import enliven
from web_server import Behaviour, serve

pytestmark = pytest.mark.numerics

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def published(family: str, num_classes: int = 7, **changes: Any) -> am.ImageClassifier:
    """A small one as its authors would publish it: 224 pixels, segments as many as rows."""
    torch.manual_seed(0)
    if family == "cycle":
        shape = {"depths": (1, 2), "dims": (8, 12), "mlp_ratios": (4, 2), "stem_stride": 4}
        return enliven(am.create_model("cycle_mlp_b1", 224, num_classes, **{**shape, **changes}))
    shape = {"patch_size": 56, "depths": (1, 1, 2), "dims": (8, 8, 12), "mlp_ratios": (3, 3, 2)}
    shape |= {"segments": (4, 4, 2), "downsamples": (False, True)}
    return enliven(am.create_model("vip_s7", 224, num_classes, **{**shape, **changes}))


def wrapped(kind: str, state: dict[str, torch.Tensor]) -> object:
    return {
        "bare": state,
        "model": {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3},
        "state_dict": {"state_dict": state, "optimizer": {"step": torch.zeros(3)}},
        "parallel": {f"module.{name}": value for name, value in state.items()},
    }[kind]


@pytest.mark.parametrize("kind", ["bare", "model", "state_dict", "parallel"])
@pytest.mark.parametrize("family", ["cycle", "permutator"])
def test_containers(tmp_path: Path, family: str, kind: str, capsys: pytest.CaptureFixture[str]):
    model = published(family).eval()
    torch.save(wrapped(kind, model.state_dict()), tmp_path / "weights.pth")
    loaded = am.load_model(tmp_path / "weights.pth")
    assert loaded.config == model.config
    images = torch.randn(2, 3, 224, 224)
    assert torch.equal(loaded(images), model(images))
    wanted = am.Preprocessing(image_size=(224, 224), interpolation="bicubic", **IMAGENET)
    assert loaded.preprocessing == wanted
    title = {"cycle": "CycleMLP", "permutator": "Vision Permutator"}[family]
    assert f"note     the file does not say its preprocessing; that of {title}'s" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("family", ["cycle", "permutator"])
def test_grey_and_headless(tmp_path: Path, family: str):
    model = published(family, num_classes=0, in_channels=1).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = am.load_model(tmp_path / "weights.safetensors", quiet=True)
    assert loaded.config == model.config
    assert loaded.preprocessing is not None
    assert loaded.preprocessing.mean == pytest.approx(0.449)
    many = published(family, in_channels=5).eval()
    safetensors.torch.save_file(many.state_dict(), tmp_path / "many.safetensors")
    assert am.load_model(tmp_path / "many.safetensors", quiet=True).preprocessing is None


def test_other_offsets_in_a_file_are_computed(tmp_path: Path):
    model = published("cycle").eval()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    name = "network.0.0.attn.sfc_h.offset"
    tensors[name] = tensors[name].flip(1)
    torch.save({"model": tensors}, tmp_path / "other.pth")
    loaded, images = am.load_model(tmp_path / "other.pth", quiet=True), torch.randn(1, 3, 224, 224)
    assert torch.equal(loaded.state_dict()[name], tensors[name])
    assert (loaded(images) - model(images)).abs().max() > 1e-4
    again = am.load_model(am.save_model(loaded, tmp_path / "saved"), num_classes=0, quiet=True)
    assert torch.equal(again(images), loaded.features(images))
    tensors[name] = tensors[name] + 0.25
    torch.save({"model": tensors}, tmp_path / "broken.pth")
    with pytest.raises(am.UserError, match=r"an offset is 1.25[\s\S]*where: .*broken.pth"):
        am.load_model(tmp_path / "broken.pth", quiet=True)


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    assert name in tensors
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("family", "gone", "message"),
    [
        (
            "cycle",
            "network.2.1.attn.sfc_h.offset",
            r"missing: network.2.1.attn.sfc_h.offset \(1, 2",
        ),
        ("cycle", "patch_embed.proj.weight", "patch_embed.proj.weight is missing"),
        ("cycle", "network.0.0.mlp.fc1.weight", "network.0.0.mlp.fc1.weight is missing"),
        ("cycle", "head.weight", "head.weight is missing"),
        ("permutator", "network.1.0.attn.mlp_h.weight", "mlp_h.weight is missing"),
        ("permutator", "network.1.0.attn.mlp_w.weight", "missing: network.1.0.attn.mlp_w.weight"),
        ("permutator", "network.2.proj.weight", "missing|extra|change from 8 to 12"),
    ],
)
def test_missing_tensors_are_named(tmp_path: Path, family: str, gone: str, message: str):
    tensors = without(published(family).state_dict(), gone)
    safetensors.torch.save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(am.UserError, match=message):
        am.load_model(tmp_path / "weights.safetensors", quiet=True)


def test_shapes_that_do_not_say_enough(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(published("cycle", stem_kernel=5).state_dict(), path)
    with pytest.raises(am.UserError, match="window is 5 pixels wide, and the file does not say"):
        am.load_model(path, quiet=True)
    safetensors.torch.save_file(published("permutator").state_dict(), path)
    grown = am.load_model(path, image_size=448, quiet=True)
    safetensors.torch.save_file(grown.state_dict(), path)
    with pytest.raises(am.UserError, match="16x16 weights at 8 channels: the file does not say"):
        am.load_model(path, quiet=True)
    tensors = published("cycle").state_dict()
    tensors["network.999999.0.mlp.fc1.weight"] = torch.zeros(4, 4)
    tensors["network.0.99999.mlp.fc1.weight"] = torch.zeros(4, 4)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(am.UserError, match=r"block 99,999 is there, but the file has \d+ tensors"):
        am.load_model(path, quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [10**9, 2]}, "the description says 1,000,000,002 blocks"),
        ({"dims": [10**12, 12]}, "cannot be built|do not fit"),
        ({"dims": "wide"}, "not a cycle_mlp architecture: dims must be whole numbers"),
        ({"cycle": 3}, "not a cycle_mlp architecture"),
        ({"family": "mixer"}, "not a mixer architecture"),
    ],
)
def test_a_false_description(tmp_path: Path, change: dict[str, Any], message: str):
    path = am.save_model(published("cycle"), tmp_path / "model")
    said = json.loads((path.parent / "config.json").read_text())
    said["architecture"] |= change
    (path.parent / "config.json").write_text(json.dumps(said))
    with pytest.raises(am.UserError, match=message):
        am.load_model(path, quiet=True)


@pytest.mark.parametrize("format", ["google", "timm"])
@pytest.mark.parametrize("family", ["cycle", "permutator"])
def test_formats_of_others_are_refused(tmp_path: Path, family: str, format: str):
    target = tmp_path / ("x.npz" if format == "google" else "x.safetensors")
    with pytest.raises(am.UserError, match=f"'{format}' has no place for this model"):
        am.save_model(published(family), target, format=format)
    assert not target.exists()


def test_every_catalogue_entry():
    found = {name: each for name, each in CHECKPOINTS.items() if not name.startswith("mixer")}
    assert list(found) == [
        *(f"cycle_mlp_b{n}.i1k" for n in range(1, 6)),
        *(f"vip_{size}.i1k" for size in ("s7", "m7", "l7")),
    ]
    for name, each in found.items():
        assert each.preprocessing.crop == (0.875 if name[-6:-4] in ("b4", "b5", "l7") else 0.9)
        assert (each.preprocessing.mean, each.preprocessing.std) == tuple(IMAGENET.values())
        assert (each.num_classes, each.gelu, each.sha256) == (1000, "exact", None)
        assert (each.by_hand is None) == name.startswith("cycle")
        assert "MIT" in each.licence
    assert found["cycle_mlp_b3.i1k"].file_name == "CycleMLP_B3.pth"
    assert found["vip_m7.i1k"].file_name == "vip_m7.pth"


def test_a_published_file_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A small stand-in from a server of our own, then under its own file name on the disk."""
    model = published("cycle", num_classes=1000).eval()
    path = tmp_path / "CycleMLP_B5.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(x=1)}, path)
    monkeypatch.setenv("MIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(download, "PAUSE", 0.01)
    entry = CHECKPOINTS["cycle_mlp_b5.i1k"]
    with serve(Behaviour(path.read_bytes())) as url:
        here = dataclasses.replace(entry, url=f"{url}/CycleMLP_B5.pth")
        monkeypatch.setitem(checkpoints.CHECKPOINTS, entry.name, here)
        fetched = am.load_model("cycle_mlp_b5.i1k", quiet=True)
    for loaded in (fetched, am.load_model(path, quiet=True)):
        assert loaded.preprocessing == entry.preprocessing
        assert loaded.class_names is not None
        assert loaded.class_names[0] == "n01440764 tench"
    other = tmp_path / "CycleMLP_B1.pth"
    torch.save(published("permutator", num_classes=1000).state_dict(), other)
    with pytest.raises(am.UserError, match=r"cycle_mlp_b1.i1k is another architecture"):
        am.load_model(other, quiet=True)


def test_a_file_that_somebody_has_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIXER_CACHE", str(tmp_path))
    place = tmp_path / "vip_l7.i1k" / "vip_l7.pth"
    message = r"on a page for browsers[\s\S]*where: https://drive.google.com/[\s\S]*put it at "
    with pytest.raises(am.UserError, match=message + str(place)):
        am.load_model("vip_l7.i1k")
    place.parent.mkdir()
    torch.save({"state_dict": published("permutator", 1000).state_dict()}, place)
    loaded = am.load_model("vip_l7.i1k", quiet=True)
    assert loaded.preprocessing == CHECKPOINTS["vip_l7.i1k"].preprocessing
    assert loaded.class_names is not None


def test_what_the_command_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "weights.pth"
    torch.save(published("permutator").state_dict(), path)
    code, out, _ = mixer(capsys, "models", "--inspect", path)
    assert code == 0
    assert "names          Vision Permutator's" in out
    assert "GELU           exact" in out
    assert "network.{0..1}.0.attn.mlp_h.weight" in out or "attn.mlp_h.weight" in out
    code, out, _ = mixer(capsys, "models", "--weights")
    assert code == 0
    assert "  page        https://drive.google.com/file/d/" in out
    row = next(line for line in out.splitlines() if line.startswith("cycle_mlp_b1.i1k "))
    assert row.split() == [
        "cycle_mlp_b1.i1k",
        "1,000",
        "~58",
        "78.9",
        "exact",
        "mean,",
        "std",
        "no",
    ]
