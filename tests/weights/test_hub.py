"""hf:owner/name against a hub of our own on loopback, and without a network."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import GOLDEN
from hub_server import Hub, serve

CONFIG = json.dumps(
    {
        "architecture": "mixer_b16_224",
        "num_classes": 7,
        "pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1], "crop_pct": 0.875},
    }
).encode()
FILES = {
    "model.safetensors": (GOLDEN / "timm_tiny.safetensors").read_bytes(),
    "config.json": CONFIG,
}


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A server that answers as the hub does for owner/tiny, branches main and v2."""

    with serve(Hub({"owner/tiny": {"main": FILES, "v2": FILES}})) as address:
        yield address


def load(source: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Loads in a process of its own: the hub's library reads its settings when imported."""
    code = (
        "import sys, allmlp as am\n"
        "try:\n"
        "    model = am.load_model(sys.argv[1])\n"
        "except am.UserError as error:\n"
        "    sys.exit('error: ' + error.text())\n"
        "print(model.config.num_classes, model.config.gelu, model.preprocessing.value_range())\n"
    )
    settings = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    settings.pop("HF_TOKEN", None)
    return subprocess.run(
        [sys.executable, "-c", code, source],
        capture_output=True,
        text=True,
        env=settings,
        timeout=60,
    )


@pytest.mark.slow
def test_a_model_of_the_hub_and_then_offline(tmp_path: Path, endpoint: str):
    online = load("hf:owner/tiny@v2", tmp_path, HF_ENDPOINT=endpoint)
    assert online.stdout == "7 exact [0, 1]\n", online.stderr
    offline = load("hf:owner/tiny@v2", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert offline.stdout == "7 exact [0, 1]\n", offline.stderr
    blob = next(path for path in tmp_path.rglob("model.safetensors")).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    damaged = load("hf:owner/tiny@v2", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert "the cached file is damaged" in damaged.stderr
    assert f"Delete {blob}" in damaged.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:owner/nothing", "no model 'owner/nothing', or it is private"),
        ("hf:owner/tiny@v9", "owner/tiny has no revision 'v9'"),
    ],
)
def test_what_is_not_there(tmp_path: Path, endpoint: str, source: str, message: str):
    result = load(source, tmp_path, HF_ENDPOINT=endpoint)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_no_network_is_one_message(tmp_path: Path):
    result = load("hf:owner/tiny", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "owner/tiny is not in the cache and the hub cannot be reached" in result.stderr
    assert "to fix: With a network: hf download owner/tiny" in result.stderr
    assert str(tmp_path) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 3  # no warnings of the hub's library
