"""Runs on arrays: statistics of the training part, a hand-written loop, resume, and where the
statistics travel."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp as am
from allmlp.data.sampler import Order
from allmlp.training.config import DataSettings
from allmlp.training.dataset import split_data
from allmlp.training.recipes import patch_for
from conftest import ran, refused
from runs import before_step

SIZES = {"hidden_dim": 8, "num_blocks": 1, "tokens_mlp_dim": 8, "channels_mlp_dim": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two channels of very different scale; the class is in the phase of the second."""
    random = np.random.default_rng(1)
    y = np.arange(80) % 2
    phase = random.uniform(-0.5, 0.5, 80) + np.pi * y
    wave = np.sin(np.linspace(0, 6, 20) + phase[:, None])
    x = np.stack([random.normal(1000, 50, (80, 20)), 0.01 * wave], axis=1)
    path = tmp_path_factory.mktemp("arrays") / "waves.npz"
    names = np.array(["up", "down"])[y]
    np.savez(path, x_train=x[:60], y_train=names[:60], x_test=x[60:], y_test=names[60:])
    return path


def config(data: Path, output: Path, **changes: Any) -> am.TrainConfig:
    values = {"data.source": str(data), "output": str(output), "model.overrides": dict(SIZES)}
    values |= {"optimizer.learning_rate": 0.01, "epochs": 20, "batch_size": 10}
    values |= {"device": "cpu", "compile": "off", "precision": "float32"}
    return am.recipe("arrays").with_values({**values, **changes})


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> am.TrainResult:
    return am.train(config(data, tmp_path_factory.mktemp("run") / "waves"), quiet=True)


def test_a_run_learns_and_its_statistics_are_those_of_the_training_part(run, data):
    assert run.test.top1 > 0.9
    model = am.load_model(run.run_folder)
    own, values = model.preprocessing, np.load(data)["x_train"].astype(np.float32)
    assert own.kind == "arrays"
    assert model.config.in_channels == 2
    assert model.config.image_size == (1, 20)
    assert model.config.patch_size == 1
    splits = split_data(DataSettings(source=str(data)))
    chosen = values[splits.train.indices].astype(np.float64)
    assert 0 < len(chosen) < 60  # a tenth is held out
    np.testing.assert_allclose(own.mean, chosen.mean(axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(own.std, chosen.std(axis=(0, 2)), rtol=1e-9)
    assert not np.allclose(own.mean, values.mean(axis=(0, 2)), rtol=1e-6)
    saved = json.loads((run.run_folder / "config.json").read_text())
    assert saved["augment"]["crop"]["name"] == "none"
    assert not saved["augment"]["flip"]


def test_logits_are_those_of_a_script_in_every_form(run, data, tmp_path):
    model = am.load_model(run.run_folder).eval()
    file = am.save_model(model, tmp_path / "m.safetensors")
    x = np.load(data)["x_test"]
    own = json.loads((run.run_folder / "best" / "config.json").read_text())["preprocessing"]
    mean, std = (np.array(own[key])[:, None] for key in ("mean", "std"))
    inputs = torch.tensor((x - mean) / std, dtype=torch.float32)[:, :, None]
    with torch.no_grad():
        exact = model(inputs).softmax(dim=1).numpy()
    for form in (model, file, run.run_folder):
        rows = am.predict(form, f"{data}:test", top_k=2)
        assert [row.path for row in rows] == [f"{data}:x_test[{at}]" for at in range(20)]
        found = [dict(row.classes)["up"] for row in rows]
        np.testing.assert_allclose(found, exact[:, model.class_names.index("up")], atol=2e-5)
    assert [r.classes[0][0] for r in am.predict(model, x)] == [r.classes[0][0] for r in rows]
    labels = np.load(data)["y_test"].tolist()
    assert am.evaluate(model, (x, labels)).top1 == am.evaluate(model, str(data)).top1
    pytest.importorskip("onnxruntime")
    report = am.export(run.run_folder, tmp_path / "m.onnx", data=str(data))
    assert report.passed
    assert report.parity.relative < 1e-4
    np.testing.assert_allclose(
        [dict(row.classes)["up"] for row in am.predict(tmp_path / "m.onnx", str(data), top_k=2)],
        exact[:, model.class_names.index("up")],
        atol=2e-5,
    )


def test_a_run_is_the_loop_that_one_would_write(data: Path, tmp_path: Path):
    changes = {"optimizer": "sgd", "optimizer.momentum": 0.0, "optimizer.clip_norm": 0.0}
    changes |= {"optimizer.warmup": 0.0, "optimizer.ema_decay": 0.0, "augment.mixup": 0.0}
    changes |= {"optimizer.schedule.final_lr_fraction": 1.0, "data.holdout": 0.0, "epochs": 2}
    settings = config(data, tmp_path / "run", **changes)
    found = am.load_model(am.train(settings, quiet=True).run_folder)
    file = np.load(data)
    x, y = file["x_train"].astype(np.float32), np.array(file["y_train"] == "up").astype(int)
    mean, std = (f(x.astype(np.float64), axis=(0, 2), keepdims=True) for f in (np.mean, np.std))
    inputs = torch.tensor((x - mean) / std, dtype=torch.float32)[:, :, None]
    torch.manual_seed(0)
    sizes = {**SIZES, "patch_size": 1, "in_channels": 2}
    model = am.create_model("mixer_s16", (1, 20), 2, **sizes).train()
    order = Order(seed=0, batch_size=10, rank=0, world_size=1)
    for places in order.places(range(12), y):
        at = [place[1] for place in places]
        loss = torch.nn.functional.cross_entropy(model(inputs[at]), torch.tensor(y[at]))
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.01 * weight.grad
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=1e-4, atol=1e-6)


def test_finetuning_keeps_the_statistics_and_takes_other_lengths(run, data, tmp_path):
    x = np.load(data)["x_train"]
    np.savez(tmp_path / "long.npz", x=np.repeat(x, 2, axis=2), y=np.arange(60) % 3)
    changes = {"model.weights": str(run.run_folder), "data.source": str(tmp_path / "long.npz")}
    changes |= {"steps": 2, "batch_size": 8, "output": str(tmp_path / "fine")}
    changes |= {"optimizer.warmup": 0, "device": "cpu"}
    fine = am.train(am.recipe("finetune").with_values(changes), quiet=True).run_folder
    model, before = am.load_model(fine), am.load_model(run.run_folder).preprocessing
    assert model.config.image_size == (1, 40)
    assert model.class_names == ["0", "1", "2"]
    assert (model.preprocessing.mean, model.preprocessing.std) == (before.mean, before.std)


def test_the_shortest_command(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    line = ("train", "--data", data, "--output", tmp_path / "run")
    one_block = ("--model", "mixer_s16", "--set", "model.overrides.num_blocks=1")
    out, _ = ran(capsys, *line, *one_block, "--device", "cpu", "--dry-run")
    assert "512 channels" in out  # not the recipe's small model
    printed, _ = ran(capsys, *line, "--epochs", "1")
    assert "2 channels of 1x20" in printed
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["recipe"] == "arrays"
    assert saved["model"]["overrides"]["patch_size"] == [1, 1]


def test_interrupted_folds_go_on(data: Path, tmp_path: Path):
    own = config(data, tmp_path / "study", **{"data.source": f"{data}:train", "epochs": 2})
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            am.cross_validate(own, 2, quiet=True)
    folder = am.cross_validate(own, 2, quiet=True).folder
    assert sorted(path.name for path in folder.glob("fold-*")) == ["fold-1", "fold-2"]
    assert "resumed" in (folder / "fold-1" / "log.txt").read_text()


def test_patch_sizes_divide_the_rows():
    found = [patch_for(*size) for size in ((1, 24), (1, 150), (1, 251), (64, 64))]
    assert found[:3] == [(1, 1), (1, 5), (1, 1)]
    assert found[3] in ((8, 8), (8, 16), (16, 8))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--data", "DATA", "--set", "augment.randaugment=9"], "randaugment"),
        (["train", "--data", "DATA", "--image-size", "1x10"], "1x20"),
        (["evaluate", "RUN", "--data", "LONG"], "1x30"),
        (["predict", "RUN", "PHOTO"], "images"),
        (["export", "RUN", "--output", "m.onnx", "--uint8-input"], "uint8"),
        (["serve", "RUN"], "serve"),
        (["data", "check", "DATA"], "data check"),
        (["data", "pack", "DATA", "packed"], "packed"),
        (["inspect", "RUN", "--image", "PHOTO"], "rows of arrays"),
    ],
)
def test_what_arrays_cannot_do(run, data, tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
    np.savez(tmp_path / "long.npz", x=np.ones((2, 2, 30)), y=["up", "down"])
    names = {"DATA": data, "RUN": run.run_folder, "LONG": "long.npz", "PHOTO": "photo.png"}
    assert named in refused(capsys, tmp_path, *(names.get(word, word) for word in arguments))
