"""Runs that go on where something was taken from them: nothing is silently done again or lost."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

import allmlp as am
from allmlp.training import train as loop
from conftest import tiny_config


def stopped_run(
    class_folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch, at: int, **changes: object
) -> am.TrainConfig:
    config = tiny_config(str(class_folder), path, **changes)
    step = loop.Trainer.train_step

    def interrupted(self: loop.Trainer, number: int, batch: object) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, number, batch)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            am.train(config, quiet=True)
    return config


@pytest.mark.parametrize("changes", [{}, {"data__holdout": 0.0}])
def test_a_run_without_its_checkpoints_is_not_trained_again(class_folder, tmp_path, changes):
    run = am.train(tiny_config(str(class_folder), tmp_path / "run", **changes), quiet=True)
    shutil.rmtree(run.run_folder / "checkpoints")
    before = (run.run_folder / "best" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(am.UserError, match="without checkpoints"):
        am.resume(run.run_folder, quiet=True)
    assert (run.run_folder / "best" / "model.safetensors").stat().st_mtime_ns == before


def test_best_weights_that_were_removed_come_back(class_folder, tmp_path, monkeypatch):
    whole = am.train(tiny_config(str(class_folder), tmp_path / "whole"), quiet=True)
    config = stopped_run(class_folder, tmp_path / "run", monkeypatch, 3)
    shutil.rmtree(tmp_path / "run" / "best")
    again = am.train(config, quiet=True)
    assert again.validation.top1 == pytest.approx(whole.validation.top1, abs=0.4)
    assert (tmp_path / "run" / "best" / "README.md").exists()
    finished = am.train(
        tiny_config(str(class_folder), tmp_path / "end", data__holdout=0.0), quiet=True
    ).run_folder
    weights = (finished / "best" / "model.safetensors").read_bytes()
    shutil.rmtree(finished / "best")
    am.resume(finished, quiet=True)
    assert (finished / "best" / "model.safetensors").read_bytes() == weights


def test_bad_validation_images_are_no_bad_training_images(class_folder, tmp_path, monkeypatch):
    for split in ("train", "val"):
        image = class_folder / split / "ant" / "0.png"
        image.write_bytes(image.read_bytes()[:-40])  # whole headers, broken pixels
    changes = {"data__max_bad": 0.09, "epochs": 4}
    (class_folder / "val" / "bee" / "0.png").rename(class_folder / "val" / "bee" / "9.png")
    for number in range(10, 14):
        shutil.copy(
            class_folder / "val" / "bee" / "9.png", class_folder / "val" / "bee" / f"{number}.png"
        )
    am.train(tiny_config(str(class_folder), tmp_path / "whole", **changes), quiet=True)
    config = stopped_run(class_folder, tmp_path / "run", monkeypatch, 7, **changes)
    am.train(config, quiet=True)
    lines = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    assert len(lines) == 2
    assert am.resume(tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "bad_files.txt").read_text().splitlines() == lines


def test_a_stop_without_checkpoints_promises_nothing(class_folder, tmp_path, monkeypatch, capfd):
    stopped_run(class_folder, tmp_path / "run", monkeypatch, 3, keep_checkpoints=0)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "the run keeps no checkpoints and cannot be resumed" in log
    assert "to resume" not in log
    assert "saves" not in capfd.readouterr().err


def test_the_best_state_is_saved_whenever_it_comes(class_folder, tmp_path):
    run = am.train(
        tiny_config(str(class_folder), tmp_path / "run", checkpoint_every=100, epochs=2), quiet=True
    ).run_folder
    assert (run / "checkpoints" / "step-00000002").is_dir()  # the first evaluation is the best


def test_mistakes_are_found_before_anything_is_written(class_folder, tmp_path):
    for changes, message in (
        ({"data__num_workers": 100_000}, "num_workers must be at most"),
        ({"output": "r/\udcff"}, "is not valid UTF-8"),
    ):
        output = Path(changes.pop("output", tmp_path / "run"))
        with pytest.raises(am.UserError, match=message):
            am.train(tiny_config(str(class_folder), output, **changes), quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(am.UserError, match="num_workers"):
        am.evaluate(
            am.load_model(
                am.train(tiny_config(str(class_folder), tmp_path / "a"), quiet=True).run_folder
            ),
            f"{class_folder}:validation",
            num_workers=100_000,
        )
