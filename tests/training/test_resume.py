"""A stopped run resumes as if it had never stopped: fault test 9, and when it must not."""

import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import allmlp as am
from allmlp.io import partial_path
from allmlp.training import state, step
from allmlp.training import train as loop
from conftest import NO_PROCESS, digest, draw, files, make_data, mixer, tiny_run
from runs import (
    DROPOUT,
    before_step,
    check_same,
    losses_of,
    results_of,
    run_config,
    steps_of,
    train,
    unix,
    watch_every_step,
)

SGD = {"optimizer": "sgd"}
PLAIN = {**SGD, "optimizer__momentum": 0.0}
MUON = {"optimizer": "muon"}
SHARPNESS = {"optimizer__sam_rho": 0.05, "optimizer__sam_start": 0.3}
PARTS = {"micro_batch_size": 3}
CASES = {
    "sgd, sharpness, in parts": {**DROPOUT, **SGD, **SHARPNESS, **PARTS},
    "muon, in parts, with workers": {**DROPOUT, **MUON, **PARTS, "data__num_workers": 2},
    "balanced by the sampler": {**DROPOUT, "data__balance": "sampler"},
    "plain sgd, balanced by weights": {**DROPOUT, **PLAIN, "data__balance": "weights"},
    "adamw, sharpness, no average": {**DROPOUT, **SHARPNESS, "optimizer__ema_decay": 0.0},
}


def check_resumed(config: am.TrainConfig, straight: Path, run: Path) -> None:
    """Stopped in mid-epoch by SIGTERM, resumed, stopped by Ctrl-C, and resumed by its settings.

    The last part has two loader workers where there were none, and the other way round.
    """
    assert len(losses_of(straight)) == 30
    assert len(set(losses_of(straight))) >= 29  # or the same bits would prove little
    config = config.with_value("output", str(run))
    assert train(config, stop_after=13) == run
    assert [line["step"] for line in steps_of(run)] == list(range(13))
    train(run, stop_after=21, by=signal.SIGINT)
    train(config.with_value("data.num_workers", 2 - (config.data.num_workers or 0)))
    check_same(run, straight)
    said = (run / "log.txt").read_text().splitlines()
    assert [line for line in said if line.startswith("resumed")] == [
        "resumed  after step 13 of 30",
        "resumed  after step 21 of 30",
    ]


@unix
def test_a_resumed_run_repeats_the_bits(data: Path, straight: Path, tmp_path: Path):
    check_resumed(run_config(data, straight, **DROPOUT), straight, tmp_path / "run")


@unix
def test_a_dry_run_of_a_finished_run_has_nothing_to_do(data: Path, straight: Path):
    config = run_config(data, straight, **DROPOUT)
    assert am.train(config, quiet=True, dry_run=True).expected_seconds is None


@unix
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_other_runs_repeat_the_bits(data: Path, tmp_path: Path, case: str):
    config = run_config(data, tmp_path / "straight", **CASES[case])
    check_resumed(config, train(config), tmp_path / "run")


@unix
def test_steps_after_the_last_checkpoint_are_repeated(data: Path, straight: Path, tmp_path: Path):
    """An error two steps after a save: what the logs say of those steps is not there twice."""
    config = run_config(data, tmp_path / "run", **DROPOUT, checkpoint_every=9)

    def fail(_: object) -> None:
        raise OSError("the network is gone")

    with pytest.MonkeyPatch.context() as patch:
        watch_every_step(patch)
        before_step(patch, 12, fail)
        with pytest.raises(OSError, match="the network is gone"):
            am.train(config, quiet=True)
    run = tmp_path / "run"
    assert len(results_of(run)) == 1  # of step 10, which comes again
    if (run / "checkpoints/step-00000010").exists():  # it was the best so far
        shutil.rmtree(run / "checkpoints/step-00000010")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # a kill in the middle of a line
    with (run / "results.csv").open("a") as file:
        file.write("4.8,12")
    train(run)
    assert "resumed  after step 9 of 30" in (run / "log.txt").read_text()
    check_same(run, straight)


def test_best_is_written_while_training_goes_on(data: Path, tmp_path: Path):
    """And holds the weights of its evaluation, not of the steps since."""
    straight, stepped = train(run_config(data, tmp_path / "straight")), threading.Event()
    calls: list[bool] = []

    def slow(*arguments: Any, save: Any = state.save_model, **options: Any) -> object:
        calls.append(bool(calls) or stepped.wait(20.0))
        return save(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "save_model", slow)
        before_step(patch, 12, lambda _: stepped.set())  # the first evaluation is after step 10
        run = train(run_config(data, tmp_path / "run"))
    assert calls
    assert all(calls)
    check_same(run, straight)


def test_best_that_cannot_be_written_is_no_checkpoint_either(data: Path, tmp_path: Path):
    config = run_config(data, tmp_path / "run")

    def full(*_: object, **__: object) -> None:
        raise am.UserError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "save_model", full)
        with pytest.raises(am.UserError, match="the disk is full"):
            train(config)
    assert not [*(tmp_path / "run" / "checkpoints").iterdir()]
    assert not (tmp_path / "run" / "best").exists()


@unix
def test_the_parts_of_a_step_stay_and_can_be_changed(data: Path, tmp_path: Path, monkeypatch):
    """What was chosen for the memory is kept, for the bits; what is asked for now comes first."""
    parts: list[int] = []
    update = step.Updater.__call__

    def noting(self: step.Updater, *arguments: object) -> object:
        parts.append(self.micro_batch_size)
        return update(self, *arguments)

    monkeypatch.setattr(step.Updater, "__call__", noting)
    monkeypatch.setattr(step.Updater, "_fitting", lambda *_: 5)
    config = run_config(data, tmp_path / "run")
    train(config, stop_after=3)
    monkeypatch.setattr(step.Updater, "_fitting", lambda *_: 7)
    train(config, stop_after=5)
    train(config.with_value("micro_batch_size", 2), stop_after=7)
    assert parts == [5, 5, 5, 5, 5, 2, 2]


def test_other_images_are_an_error(tmp_path: Path):
    data, run = make_data(tmp_path / "data"), tmp_path / "run"
    train(run_config(data, run), stop_after=13)
    kept = shutil.copytree(data, tmp_path / "kept")
    before = files(run)
    for change in ("one more", "another class", "other bytes", "validation"):
        shutil.rmtree(data)
        shutil.copytree(kept, data)
        if change == "one more":
            draw(900).save(data / "train" / "ant" / "new.png")
        elif change == "another class":
            (data / "train" / "ant" / "0.png").rename(data / "train" / "bee" / "zero.png")
        else:
            split = "val" if change == "validation" else "train"
            draw(901).save(data / split / "ant" / "0.png")
        with pytest.raises(am.UserError, match="differ from those that the run") as error:
            train(run)
        assert error.value.where == str(run)
    assert files(run) == before
    shutil.rmtree(data)
    shutil.copytree(kept, data)
    assert len(losses_of(train(run))) == 30


@unix
def test_images_that_were_moved_are_the_same(data: Path, tmp_path: Path, monkeypatch, capsys):
    """Renamed, then relative and from another working directory, with a bad image among them."""
    here, there, other = (tmp_path / name for name in ("here", "there", "other"))
    shutil.copytree(data, here)
    (here / "train" / "bee" / "1.png").write_bytes(b"")
    shutil.copytree(here, other)
    draw(902).save(other / "val" / "ant" / "0.png")
    straight = train(run_config(here, tmp_path / "straight"))
    config = run_config(here, tmp_path / "run")
    run = train(config, stop_after=13)
    here.rename(there)
    with pytest.raises(am.UserError, match=r"no such data[\s\S]*--data WHERE_IT_IS"):
        am.resume(run, quiet=True)
    before = digest(run / "config.json"), digest(run / "log.txt")
    with pytest.raises(am.UserError, match="the images differ from those .*other.*") as error:
        am.train(config.with_value("data.source", str(other)), quiet=True)
    assert str(here) in error.value.what
    assert (digest(run / "config.json"), digest(run / "log.txt")) == before
    train(config.with_value("data.source", str(there)), stop_after=21)
    monkeypatch.chdir(tmp_path)
    watch_every_step(monkeypatch)
    code, out, err = mixer(capsys, "train", "--resume", "run", "--data", "there")
    assert (code, err) == (0, "")
    assert "resumed  after step 21 of 30\n" in out
    check_same(run, straight)
    assert json.loads((run / "config.json").read_text())["data"]["source"] == "there"


@unix
def test_stopping_early(data: Path, tmp_path: Path, monkeypatch):
    """The second evaluation is the best; the run ends two later, and best/ is of that."""
    right, looked_at = iter([3, 6, 6, 5, 9]), []
    measure = loop.measure

    def chosen(model, *arguments):
        result = measure(model, *arguments)
        looked_at.append({name: value.clone() for name, value in model.state_dict().items()})
        result.logits[:] = 0.0
        number = next(right)
        for place, label in enumerate(result.labels):
            result.logits[place, label if place < number else label - 1] = 2.0
        return result

    monkeypatch.setattr(loop, "measure", chosen)
    changes = {"patience": 2, "evaluate_every": 4, "steps": 40, "checkpoint_every": 3}
    config = run_config(data, tmp_path / "run", **changes)
    train(config, stop_after=14)  # between the last evaluation and that before
    run = train(config)
    assert len(losses_of(run)) == 16
    assert [row["best"] for row in results_of(run)] == ["1", "1", "0", "0"]
    right_ones = ["0.333333", "0.666667", "0.666667", "0.555556"]
    assert [row["validation_top1"] for row in results_of(run)] == right_ones
    said = "stopped early: no better result in 2 evaluations"
    assert said in (run / "log.txt").read_text()
    best = am.load_model(run).state_dict()
    same = [all(torch.equal(best[n], weights[n]) for n in best) for weights in looked_at]
    assert same == [False, True, False, False]
    before = files(run / "checkpoints") | files(run / "best")
    monkeypatch.setattr(loop, "training_batches", lambda *_, **__: pytest.fail("it trained again"))
    train(run)
    readme = {str(run / "best/README.md"): ""}
    assert {**files(run / "checkpoints"), **files(run / "best"), **readme} == {**before, **readme}
    assert len(losses_of(run)) == 16


def test_an_infinite_gradient_changes_nothing(data, straight, tmp_path, monkeypatch):
    """Fault test 14: one number of one gradient is infinite, at step 17; resumed without it."""
    config = run_config(data, tmp_path / "run", **DROPOUT, checkpoint_every=7)
    trainers: list[loop.Trainer] = []
    before: dict[str, torch.Tensor] = {}

    def poison(trainer: loop.Trainer) -> None:
        trainers.append(trainer)
        tensors = trainer.tensors()
        before.update({name: value.detach().clone() for name, value in tensors.items()})
        place = torch.zeros_like(trainer.model.stem.weight).flatten()
        place[5] = float("inf")
        trainer.model.stem.weight.register_hook(lambda g: g + place.view_as(g))

    with monkeypatch.context() as patch:
        before_step(patch, 17, poison)
        with pytest.raises(am.UserError, match=r"step 17: loss .*gradient norm inf at") as error:
            train(config)
    last = tmp_path / "run" / "checkpoints" / "step-00000014"
    assert f"the last good checkpoint is {last}" in error.value.what
    assert error.value.fix is not None
    after = trainers[0].tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    check_same(train(tmp_path / "run"), straight)


def test_a_run_killed_while_its_folder_was_made_begins_again(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = run_config(data, run)
    left = run / "plots" / ".model.safetensors.abc.partial"  # as if in best/
    left.mkdir(parents=True)
    (left / ".tmpAbCdEf").write_bytes(b"half")
    (run / ".lock").touch()
    (run / "config.json").write_text(json.dumps(config.to_json()))
    partial_path(run / "config.json", NO_PROCESS).write_text("{")
    train(config)
    assert json.loads((run / "environment.json").read_text())["seed"] == 0
    assert not [*run.rglob(".*")]


def test_a_run_without_its_checkpoints_is_not_trained_again(class_folder, tmp_path):
    run = tiny_run(class_folder, tmp_path / "run")
    shutil.rmtree(run.run_folder / "checkpoints")
    before = (run.run_folder / "best" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(am.UserError, match="without checkpoints"):
        am.resume(run.run_folder, quiet=True)
    assert (run.run_folder / "best" / "model.safetensors").stat().st_mtime_ns == before
