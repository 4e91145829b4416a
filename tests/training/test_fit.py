"""Settings that fit the number of images, the time said before the start, probes and warnings."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import allmlp as am
from allmlp.data.sources import open_splits
from allmlp.evaluation.features import frozen_features
from allmlp.evaluation.predictor import Predictor
from allmlp.evaluation.probe import fit_probe
from allmlp.training import train as loop
from allmlp.training.fit import describe_fit, fitting
from allmlp.training.optim import check_warmup, warmup_steps
from allmlp.weights.checkpoints import recommended
from conftest import best_of, make_class_folder, mixer, ran, refused, tiny_config, tiny_model


@pytest.mark.parametrize(
    ("images", "device", "processes", "batch", "epochs"),
    [
        *((1, "cpu", 1, 1, 100), (9, "cpu", 1, 2, 100), (79, "cpu", 1, 16, 100)),
        *((88, "cpu", 1, 16, 91), (1259, "cpu", 1, 256, 100), (2047, "cpu", 1, 256, 63)),
        *((2048, "cpu", 1, 512, 100), (2560, "cpu", 1, 512, None), (9000, "cpu", 1, 512, None)),
        *((20_000, "cpu", 1, 512, None), (2_000_000, "cpu", 1, 512, None)),
        *((88, "cuda", 1, 32, 100), (1100, "cuda", 1, 512, 100), (9000, "cuda", 1, 512, None)),
        *((9, "cpu", 6, 6, 100), (79, "cpu", 6, 12, 76), (5000, "cpu", 8, 512, None)),
    ],
)
def test_batch_and_epochs_follow(monkeypatch, images, device, processes, batch, epochs):
    """From the images; a GPU takes larger batches, and they divide by the processes."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert fitting(images, device) == (batch, epochs)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_class_folder(tmp_path / "data" / "train", {"ant": 20, "bee": 20, "cat": 14})
    make_class_folder(tmp_path / "data" / "test", {"ant": 3, "bee": 3, "cat": 3}, start=100)
    am.save_model(tiny_model(4), tmp_path / "weights")
    return tmp_path


@pytest.mark.parametrize(
    ("own", "batch", "length"),
    [
        ({}, 8, (82, None)),
        ({"epochs": 1}, 8, (1, None)),
        ({"epochs": 10, "batch_size": 512}, 512, (10, None)),
        ({"batch_size": 1}, 1, (30, None)),
        ({"steps": 1}, 8, (None, 1)),
    ],
)
def test_what_the_user_sets_wins(place: Path, own: dict[str, int], batch: int, length: object):
    config = am.finetune_config(str(place / "weights"), str(place / "data"), own)
    assert (config.batch_size, (config.epochs, config.steps)) == (batch, length)
    steps = config.steps or max(1, round((config.epochs or 0) * 49 / config.batch_size))
    check_warmup(config.optimizer, steps)
    assert warmup_steps(config.optimizer, steps) == round(0.2 * steps)
    again = am.finetune_config(
        str(place / "weights"), str(place / "data"), {}, [f"{k}={v}" for k, v in own.items()]
    )
    assert again == config
    fixed = am.finetune_config("w", str(place / "data"), own, recipe_name="finetune_cifar")
    assert fixed.batch_size == own.get("batch_size", 512)
    assert (fixed.optimizer.warmup == 500) == (own.keys() <= {"batch_size"})


def test_a_large_set_keeps_the_recipe(monkeypatch: pytest.MonkeyPatch):
    splits = SimpleNamespace(train=range(3000))
    monkeypatch.setattr("allmlp.training.fit.split_data", lambda _: splits)
    own = {"model.weights": "w", "data.source": "d"}
    config = am.finetune_config("w", "d")
    assert config == am.recipe("finetune").with_values(own)
    assert describe_fit(config, 3000) is None
    smaller = am.finetune_config("w", "d", {"batch_size": 64})
    assert (smaller.batch_size, smaller.epochs) == (64, 30)


def test_the_timed_steps_change_no_bit(place: Path):
    changes = {"augment__mixup": 0.5, "optimizer__ema_decay": 0.9, "epochs": 1}
    runs = []
    for number, quiet in enumerate((True, False)):
        config = tiny_config(str(place / "data"), place / str(number), **changes)
        runs.append(am.train(config, quiet=quiet))
    assert runs[0].expected_seconds is None
    assert (runs[1].expected_seconds or 0.0) > 0
    assert best_of(runs[0].run_folder) == best_of(runs[1].run_folder)


@pytest.mark.slow
def test_an_image_that_hangs_stops_the_measurement(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop.Augmentation, "__call__", lambda *_: time.sleep(1))
    config = tiny_config(str(place / "data"), place / "run", data__timeout=0.2, data__num_workers=1)
    with pytest.raises(am.UserError, match=r"no batch for 0\.2 seconds"):
        am.train(config, quiet=True, dry_run=True)


@pytest.mark.parametrize("more", [(), ("--probe",), ("--grid", "0.01", "--seeds", "1", "2")])
def test_a_dry_run_writes_nothing(capsys, place: Path, monkeypatch: pytest.MonkeyPatch, more):
    monkeypatch.chdir(place)
    monkeypatch.setattr(loop.Trainer, "train", lambda _: pytest.fail("it trained"))
    before = sorted(place.rglob("*"))
    line = ("finetune", "weights", "--data", "data", "--device", "cpu", "--dry-run", *more)
    out, _ = ran(capsys, *line)
    assert "\ntime     about " in out
    assert ("3 such runs" in out) == ("--grid" in more)
    assert sorted(place.rglob("*")) == before
    result = am.train(tiny_config("data", Path("run")), quiet=True, dry_run=True)
    assert (result.expected_seconds or 0) > 0
    assert sorted(place.rglob("*")) == before


def test_a_probe_is_an_ordinary_run(capsys, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIXER_CACHE", str(place / "cache"))
    data, run = place / "data", place / "run"
    line = ("finetune", place / "weights", "--data", data, "--output", run, "--device", "cpu")
    out, _ = ran(capsys, *line, "--probe", "--set", "optimizer.ema_decay=0.9")
    assert f"mixer finetune {run} --data {data}" in out
    begun, model = am.load_model(place / "weights"), am.load_model(run)
    splits = open_splits(str(data))
    held_out = loop.open_training_data(am.finetune_config("w", str(data)).data).train
    features = frozen_features(Predictor(begun), held_out)
    probe = fit_probe(features.values, held_out.labels, 3)
    tested = frozen_features(Predictor(begun), splits["test"]).values
    result = am.evaluate(run, f"{data}:test")
    assert result.predictions.tolist() == probe.logits(tested).argmax(1).tolist()
    np.testing.assert_allclose(model.head.weight.detach(), probe.weight, rtol=1e-4, atol=1e-6)
    assert torch.equal(*(net.get_parameter("stem.weight") for net in (model, begun)))
    assert "linear probe" in (run / "best" / "README.md").read_text()
    before = best_of(run)
    out, _ = ran(capsys, "train", "--resume", run)
    assert best_of(run) == before
    for wrong in (["--seeds", "1", "2"], ["--set", "loss=sigmoid"]):
        err = refused(capsys, place, *line[:-4], "--output", place / "no", "--probe", *wrong)
        assert "probe" in err


@pytest.mark.slow
def test_too_few_images_for_random_weights(capsys, place: Path):
    line = ("train", "--data", place / "data", "--image-size", 32, "--dry-run", "--device", "cpu")
    out, _ = ran(capsys, *line)
    name = recommended("speed").name
    assert f"mixer finetune {name} --data {place / 'data'}" in out
    code, out, _ = mixer(capsys, "train", "--dry-run", "--device", "cpu")  # digits, a tiny model
    assert code == 0
    assert "mixer finetune" not in out
