"""The list of published checkpoints, and loading by their names from a server of our own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import allmlp as am
from allmlp.models.catalog import ARCHITECTURES
from allmlp.weights import checkpoints, download
from allmlp.weights.checkpoints import CHECKPOINTS, checkpoint_of_file, find_checkpoint
from web_server import Behaviour, serve


def test_everything_published_is_there_once():
    google = [each for each in CHECKPOINTS.values() if "mixer_models" in each.url]
    timm = [each for each in CHECKPOINTS.values() if each.hub]
    mixers = [each for each in CHECKPOINTS.values() if each.model.startswith("mixer_")]
    assert (len(google), len(timm), len(mixers)) == (11, 6, 17)
    assert len({each.url for each in CHECKPOINTS.values()}) == len(CHECKPOINTS) == 17 + 8
    assert {each.model for each in CHECKPOINTS.values()} <= set(ARCHITECTURES)
    for each in mixers:
        letter, patch = each.model.removeprefix("mixer_")[0], each.model.removeprefix("mixer_")[1:]
        for named in (each.url, each.hub or each.url):
            assert f"{letter}{patch}" in named.lower().replace("_", "")
        assert each.licence
        assert each.accuracy
        assert (each.preprocessing.value_range() == "[0, 1]") == ("miil" in each.name)
        assert each.gelu == ("exact" if each.hub else "tanh")


def test_published_sizes_are_those_of_the_parameters():
    """The listing's sizes, to two decimals, are the parameters and 40 to 90 KiB of headers."""
    for each in CHECKPOINTS.values():
        if each.mebibytes is not None:
            assert 0.02 < each.mebibytes - each.parameters_mebibytes < 0.09


def test_the_wrong_tag_is_noted():
    for name in ("mixer_b16.timm_i1k", "mixer_l16.timm_i1k"):
        assert "that is wrong: it is ImageNet-1k from scratch" in CHECKPOINTS[name].note
        assert CHECKPOINTS[name].trained_on == "ImageNet-1k from scratch"


def test_names_of_ours_and_of_timms():
    assert find_checkpoint("mixer_b16.i21k") is CHECKPOINTS["mixer_b16.i21k"]
    timm = find_checkpoint("mixer_b16_224.goog_in21k_ft_in1k")
    assert timm is CHECKPOINTS["mixer_b16.timm_i1k"]
    assert find_checkpoint("timm/mixer_b16_224.miil_in21k") is CHECKPOINTS["mixer_b16.miil_in21k"]
    assert find_checkpoint("mixer_b16") is None
    assert checkpoint_of_file("Mixer-B_16.npz") is None  # four files are called so
    found = checkpoint_of_file("jx_mixer_l16_224_in21k-846aa33c.pth")
    assert found is CHECKPOINTS["mixer_l16.timm_i21k"]


def test_imagenet_classes():
    names = CHECKPOINTS["mixer_b16.i1k"].class_names()
    assert names is not None
    assert (len(names), len(set(names)), names[0], names[999]) == (
        1000,
        1000,
        "n01440764 tench",
        "n15075141 toilet tissue",
    )
    assert names == sorted(names)  # by WordNet id, as ILSVRC numbers them
    assert CHECKPOINTS["mixer_b16.i21k"].class_names() is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixer_b16.i12k", r"no such model: 'mixer_b16.i12k'[\s\S]*mean mixer_b16.i"),
        ("mixer_b16", r"an architecture and has no weights[\s\S]*mixer_b16.i1k, mixer_b16.i21k"),
        ("mixer_h14", "an architecture and has no weights"),
        ("runs/nothing", "no such model: 'runs/nothing'"),
        ("hf:nothing", "not a model on the hub: 'hf:nothing'"),
    ],
)
def test_unknown_names(name: str, message: str):
    with pytest.raises(am.UserError, match=message):
        am.load_model(name)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> am.ImageClassifier:
    """A small model in the place of mixer_s32.gsam, its Google file on a server of our own."""
    torch.manual_seed(1)
    sizes = {"hidden_dim": 16, "num_blocks": 2, "tokens_mlp_dim": 8, "channels_mlp_dim": 16}
    model = am.create_model("mixer_s32", 64, 1000, **sizes).eval()
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight)
    path = am.save_model(model, tmp_path / "Mixer-S_32.npz", format="google")
    monkeypatch.setenv("MIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(download, "PAUSE", 0.01)
    behaviour = Behaviour(path.read_bytes(), cut_after=[20_000])
    with serve(behaviour) as url:
        entry = dataclasses.replace(
            CHECKPOINTS["mixer_s32.gsam"],
            url=f"{url}/Mixer-S_32.npz",
            mebibytes=round(len(behaviour.content) / 2**20, 2),
        )
        monkeypatch.setitem(checkpoints.CHECKPOINTS, entry.name, entry)
        yield model


def test_loading_by_name(
    small: am.ImageClassifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    loaded = am.load_model("mixer_s32.gsam")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), small(images))
    assert loaded.class_names == CHECKPOINTS["mixer_b16.i1k"].class_names()
    assert loaded.preprocessing == am.Preprocessing(image_size=(64, 64))
    error = capsys.readouterr().err
    assert "fetching mixer_s32.gsam" in error
    assert "again    the connection broke (the connection ended after 20,000 of" in error
    assert "note     mixer_s32.gsam: users report" in error
    place = tmp_path / "cache" / "mixer_s32.gsam"
    assert sorted(path.name for path in place.iterdir() if path.suffix != ".lock") == [
        "Mixer-S_32.npz",
        "Mixer-S_32.npz.sha256",
    ]
    grown = am.load_model("mixer_s32.gsam", image_size=128, num_classes=3)
    assert grown.config.image_size == (128, 128)
    assert "fetching" not in capsys.readouterr().err


def test_a_saved_copy_says_all_of_it(small: am.ImageClassifier, tmp_path: Path):
    path = am.save_model(am.load_model("mixer_s32.gsam", quiet=True), tmp_path / "folder")
    said = json.loads((path.parent / "config.json").read_text())
    assert said["class_names"][1] == "n01443537 goldfish"
    assert said["architecture"]["gelu"] == "tanh"


def test_imagenet_folders_are_matched_by_their_wordnet_ids(
    small: am.ImageClassifier, tmp_path: Path
):
    from conftest import make_class_folder

    folder = make_class_folder(tmp_path / "imagenet", {"n01443537": 2, "n15075141": 1})
    model = am.load_model("mixer_s32.gsam", quiet=True)
    result = am.evaluate(model, str(folder), allow_missing_classes=True, num_workers=0)
    assert result.labels.tolist() == [1, 1, 999]
