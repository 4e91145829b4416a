"""hf:owner/name against a hub of our own on loopback, and without a network."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from test_layouts import timm_folder

import allmlp as am
from hub_server import Hub, serve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[Path]:
    """The hub's cache, with a hub that has owner/tiny, branches main and v2."""
    files = {path.name: path.read_bytes() for path in timm_folder(tmp_path).iterdir()}
    with serve(Hub({"owner/tiny": {"main": files, "v2": files}}), tmp_path):
        yield tmp_path / "cache"


def test_a_model_of_the_hub_and_then_offline(cache: Path, monkeypatch: pytest.MonkeyPatch):
    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        model = am.load_model("hf:owner/tiny@v2", quiet=True)
        assert (model.config.num_classes, model.config.gelu) == (7, "exact")
        assert model.preprocessing.value_range() == "[0, 1]"
    blob = next(path for path in cache.rglob("model.safetensors")).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(am.UserError, match="the cached file is damaged") as caught:
        am.load_model("hf:owner/tiny@v2")
    assert str(blob) in str(caught.value.fix)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:owner/nothing", "no model 'owner/nothing', or it is private"),
        ("hf:owner/tiny@v9", "owner/tiny has no revision 'v9'"),
    ],
)
def test_what_is_not_there(source: str, message: str):
    with pytest.raises(am.UserError, match=message):
        am.load_model(source)


def test_no_network_is_one_message(cache: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(am.UserError, match="owner/tiny is not in the cache") as caught:
        am.load_model("hf:owner/tiny")
    assert caught.value.where == str(cache)
    assert "hf download owner/tiny" in str(caught.value.fix)
    assert capfd.readouterr().err == ""  # no warnings of the hub's library
