"""What many tests share: small drawn images, class folders, and one trained run."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mlp_mixer as mm
from mlp_mixer.cli.main import main

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

# A job in the background of a script ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes of `pytest -n` share the cores, and so does what they start.
_neighbours = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _neighbours > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // _neighbours))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def draw(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture, width x height, of noise on a colour that the seed chooses."""
    random = np.random.default_rng(seed)
    color = random.integers(0, 200, size=3)
    pixels = color + random.integers(0, 55, size=(size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def make_class_folder(folder: Path, classes: dict[str, int], start: int = 0) -> Path:
    """FOLDER/<class>/<n>.png with so many drawn images each."""
    seed = start
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            draw(seed).save(folder / name / f"{number}.png")
            seed += 1
    return folder


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """A data set with train/ and val/ of three classes."""
    make_class_folder(tmp_path / "data" / "train", {"ant": 6, "bee": 8, "cat": 6})
    make_class_folder(tmp_path / "data" / "val", {"ant": 3, "bee": 3, "cat": 3}, start=100)
    return tmp_path / "data"


TINY = {
    "patch_size": 4,
    "hidden_dim": 16,
    "num_blocks": 2,
    "tokens_mlp_dim": 8,
    "channels_mlp_dim": 32,
}


def tiny_config(source: str, output: Path, **changes: object) -> mm.TrainConfig:
    """A run that takes a second, of any source."""
    config = mm.recipe("scratch")
    values: dict[str, object] = {
        "data.source": source,
        "output": str(output),
        "model.image_size": 8,
        "epochs": 2,
        "batch_size": 8,
        "evaluate_every": 1,
        "device": "cpu",
        "model.overrides": TINY,
        "data.num_workers": 0,
    }
    for key, value in {**values, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        config = config.with_value(key, value)
    return config


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> mm.TrainResult:
    """A short run on the digits; nobody may change its folder."""
    config = mm.recipe("digits").with_value("epochs", 3)
    config = config.with_value("output", str(tmp_path_factory.mktemp("trained") / "run"))
    return mm.train(config.with_value("device", "cpu"), quiet=True)


def tiny_model(
    num_classes: int = 7, image_size: int | tuple[int, int] = 8, **changes: object
) -> mm.ImageClassifier:
    """An 8x8-pixel Mixer with random weights everywhere, also in the head."""
    torch.manual_seed(0)
    model = mm.create_model("mixer_s16", image_size, num_classes, **{**TINY, **changes})
    if model.head is not None:
        torch.nn.init.normal_(model.head.weight)
    return model


def mixer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Runs the command in this process; returns exit code, standard output and error."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err
