"""The list of published checkpoints, and loading by their names from a server of our own."""

import argparse
import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_layouts import IMAGENET, published

import allmlp as am
from allmlp.weights import checkpoints
from allmlp.weights.checkpoints import CHECKPOINTS, checkpoint_of_file, find_checkpoint
from conftest import tiny_model
from web_server import Behaviour, serve


def test_everything_published_is_there_once():
    found = Counter(name.partition("_")[0] for name in CHECKPOINTS)
    assert found == {"mixer": 17, "gmixer": 1, "gmlp": 1, "resmlp": 11, "cycle": 5, "vip": 3}
    assert am.list_checkpoints() == list(CHECKPOINTS)
    assert len({found.url for found in CHECKPOINTS.values()}) == len(CHECKPOINTS)
    for known in CHECKPOINTS.values():
        assert (known.preprocessing.value_range() == "[0, 1]") == ("miil" in known.name)
        assert known.gelu == ("tanh" if "mixer_models" in known.url else "exact")
        assert known.licence
        if known.hub:
            assert known.hub.startswith(f"timm/{known.model}_224.")
        # The listing's sizes are the parameters and 40 to 90 KiB of headers.
        if known.mebibytes is not None:
            assert 0.02 < known.mebibytes - known.parameters_mebibytes < 0.09


def test_input_of_other_families():
    """ImageNet's mean and deviation; the crops are those of their authors."""
    for name, known in CHECKPOINTS.items():
        if name.startswith(("resmlp", "gmixer", "cycle_mlp", "vip")):
            less = name.startswith("gmixer") or name[-6:-4] in ("b4", "b5", "l7")
            assert known.preprocessing.crop == (0.875 if less else 0.9)
            assert known.preprocessing.interpolation == "bicubic"
            assert (known.preprocessing.mean, known.preprocessing.std) == tuple(IMAGENET.values())
            assert (known.by_hand is None) == (not name.startswith("vip"))


def test_names_of_ours_and_of_timms():
    assert find_checkpoint("mixer_b16.i21k") is CHECKPOINTS["mixer_b16.i21k"]
    timm = find_checkpoint("mixer_b16_224.goog_in21k_ft_in1k")
    assert timm is CHECKPOINTS["mixer_b16.timm_i1k"]
    assert find_checkpoint("timm/mixer_b16_224.miil_in21k") is CHECKPOINTS["mixer_b16.miil_in21k"]
    assert find_checkpoint("mixer_b16") is None
    assert checkpoint_of_file("Mixer-B_16.npz") is None  # four files are called so
    names = CHECKPOINTS["mixer_b16.i1k"].class_names() or []
    assert (len(set(names)), names[0]) == (1000, "n01440764 tench")
    assert names == sorted(names)  # by WordNet id, as ILSVRC numbers them
    assert CHECKPOINTS["mixer_b16.i21k"].class_names() is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixer_b16.i12k", r"'mixer_b16.i12k'[\s\S]*mean mixer_b16.i"),
        ("mixer_b16", r"an architecture[\s\S]*mixer_b16.i1k, mixer_b16.i21k"),
        ("runs/nothing", "'runs/nothing'"),
        ("hf:nothing", "'hf:nothing'"),
    ],
)
def test_unknown_names(name: str, message: str):
    with pytest.raises(am.UserError, match=message):
        am.load_model(name)


def test_loading_by_name(tmp_path, monkeypatch, capsys):
    """A small model in the place of mixer_s32.gsam, its Google file on a server of our own."""
    model = tiny_model(num_classes=1000).eval()
    path = am.save_model(model, tmp_path / "Mixer-S_32.npz", format="google")
    monkeypatch.setenv("MIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    known = CHECKPOINTS["mixer_s32.gsam"]
    with serve(Behaviour(path.read_bytes())) as url:
        size = round(path.stat().st_size / 2**20, 2)
        here = dataclasses.replace(known, url=f"{url}/Mixer-S_32.npz", mebibytes=size)
        monkeypatch.setitem(checkpoints.CHECKPOINTS, here.name, here)
        loaded = am.load_model("mixer_s32.gsam")
        error = capsys.readouterr().err
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(images), model(images))
    assert loaded.class_names == known.class_names()
    assert loaded.preprocessing == am.Preprocessing(image_size=(8, 8))
    assert "fetching mixer_s32.gsam" in error
    assert "note     mixer_s32.gsam: users report" in error
    grown = am.load_model("mixer_s32.gsam", image_size=16, num_classes=3)  # from the cache
    assert grown.config.image_size == (16, 16)


def test_a_published_file_by_its_file_name(tmp_path: Path):
    model = published("cycle", num_classes=1000).eval()
    path = tmp_path / "CycleMLP_B5.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(x=1)}, path)
    loaded = am.load_model(path, quiet=True)
    assert loaded.preprocessing == CHECKPOINTS["cycle_mlp_b5.i1k"].preprocessing
    assert loaded.class_names is not None
    other = tmp_path / "CycleMLP_B1.pth"
    for wrong in (published("permutator", num_classes=1000), published("cycle", num_classes=5)):
        torch.save(wrong.state_dict(), other)
        with pytest.raises(am.UserError, match=r"cycle_mlp_b1.i1k"):
            am.load_model(other, quiet=True)


def test_a_file_that_somebody_has_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIXER_CACHE", str(tmp_path))
    place = tmp_path / "vip_l7.i1k" / "vip_l7.pth"
    by_hand = r"https://drive.google.com/[\s\S]*put it at " + str(place)
    with pytest.raises(am.UserError, match=by_hand):
        am.load_model("vip_l7.i1k")
    place.parent.mkdir()
    torch.save({"state_dict": published("permutator", 1000).state_dict()}, place)
    loaded = am.load_model("vip_l7.i1k", quiet=True)
    assert loaded.preprocessing == CHECKPOINTS["vip_l7.i1k"].preprocessing
    assert loaded.class_names is not None
