"""Models to the hub and back, against a hub on loopback."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import allmlp as am
from conftest import ROOT, draw, ran, refused, tiny_model, user_error
from hub_server import Hub, serve

# The hub's library sends files in a way that its HTTP library will drop.
WHY = "pip install 'allmlp[export]'"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(Hub(), tmp_path) as served:
        yield served


def check_same(model: am.ImageClassifier, other: am.ImageClassifier) -> None:
    assert model.class_names == other.class_names
    assert model.preprocessing == other.preprocessing
    assert model.decision == other.decision
    assert model.config == other.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_run_is_pushed_and_loaded_again(capsys, hub: Hub, trained: am.TrainResult, tmp_path):
    pytest.importorskip("onnxscript", reason=WHY)
    run = tmp_path / "run"
    shutil.copytree(trained.run_folder, run)
    am.export(run, run / "model.onnx", image_size=16)
    draw(0).save(tmp_path / "seven.png")
    words = ("--private", "--license", "mit", "--examples", tmp_path / "seven.png")
    out, _ = ran(capsys, "push", run, "me/digits", *words, "--message", "First")
    assert f"{hub.endpoint}/me/digits" in out
    assert 'load_model("hf:me/digits")' in out
    files = hub.repos["me/digits"]["main"]
    weights = {"model.safetensors", "config.json", "README.md", "model.onnx"}
    assert set(files) == weights | {"examples/seven.png"}  # names no training image
    assert files["model.safetensors"] == (run / "best/model.safetensors").read_bytes()
    assert hub.commits == [("me/digits", "main", "First")]
    assert {"visibility": "private"}.items() <= hub.created[0].items()
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert 'am.predict("hf:me/digits", ["photo.jpg"])' in card.text
    assert "mixer predict hf:me/digits photo.jpg" in card.text
    assert 'predict(".' not in card.text
    assert "## Training" in card.text
    assert card.data.license == "mit"
    assert card.data.library_name == "allmlp"
    assert card.data.eval_results is not None
    assert card.data.to_dict()["widget"][0]["src"].endswith("resolve/main/examples/seven.png")
    model = am.load_model(run)
    check_same(model, am.load_model("hf:me/digits", quiet=True))
    check_same(model, am.MlpMixer.from_pretrained("me/digits"))


def test_methods_of_the_networks(hub: Hub, tmp_path: Path):
    model = tiny_model(["ant", "bee"])
    pushed = model.push_to_hub("me/tiny", revision="v2")
    assert hub.commits[0][:2] == ("me/tiny", "v2")
    assert pushed.source == "hf:me/tiny@v2"
    assert b"hf:me/tiny@v2" in hub.repos["me/tiny"]["v2"]["README.md"]
    assert b"license: not stated" in hub.repos["me/tiny"]["v2"]["README.md"]
    check_same(model, am.MlpMixer.from_pretrained("me/tiny", revision="v2"))
    model.save_pretrained(tmp_path / "here")
    check_same(model, am.ImageClassifier.from_pretrained(tmp_path / "here"))
    other = am.create_model("resmlp_12", 16, 2)
    with user_error("wrong-type"):
        type(other).from_pretrained(tmp_path / "here")


@pytest.mark.parametrize(
    ("repo", "token", "fails", "word"),
    [
        ("me/tiny", "", "", "HF_TOKEN"),
        ("me/tiny", "hf_reader", "", "write"),
        ("me/tiny", "hf_writer", "validate-yaml", "me/tiny"),
        ("tiny", "hf_writer", "", "tiny"),
        ("me/a b", "hf_writer", "", "me/a b"),
    ],
)
def test_errors_are_one_message_and_change_nothing(
    hub: Hub, capsys, monkeypatch, tmp_path, repo, token, fails, word
):
    am.save_model(tiny_model(2), tmp_path / "m.safetensors")
    monkeypatch.setenv("HF_TOKEN", token)
    hub.fails = fails
    assert word in refused(capsys, tmp_path, "push", tmp_path / "m.safetensors", repo)
    assert hub.commits == []
    assert hub.large == {}


def test_two_examples_of_one_name(hub: Hub, tmp_path: Path):
    for name in "ab":
        (tmp_path / name).mkdir()
        draw(1).save(tmp_path / name / "1.png")
    examples = tuple(str(tmp_path / name / "1.png") for name in "ab")
    with user_error("conflict"):
        am.push(tiny_model(["a", "b"]), "me/x", examples=examples)


def test_an_export_of_other_weights_is_not_pushed(hub: Hub, tmp_path: Path):
    pytest.importorskip("onnxscript", reason=WHY)
    old = (ROOT / "tests" / "golden" / "old_name" / "model.onnx").read_bytes()
    am.save_model(tiny_model(["a", "b"]), tmp_path)
    am.export(tmp_path, tmp_path / "model.onnx")
    exported = (tmp_path / "model.onnx").read_bytes()
    am.save_model(tiny_model(["a", "b"], gelu="exact"), tmp_path, overwrite=True)
    for content, age in ((exported, 0), (old, 1000)):
        (tmp_path / "model.onnx").write_bytes(content)
        before = time.time() - age
        os.utime(tmp_path / "model.onnx", (before, before))
        with user_error("stale"):
            am.push(tmp_path, "me/x")
    assert hub.commits == []


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with user_error("offline"):
        am.push(tiny_model(2), "me/tiny")
    assert hub.created == []
