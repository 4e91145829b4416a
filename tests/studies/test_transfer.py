"""Suites of fine-tuning: what each run is given, the means, and how a suite goes on."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import allmlp as am
from allmlp.evaluation.measurement import read_measurement
from allmlp.studies.suite_result import suite_result
from allmlp.studies.vtab_tasks import AVG5, VTAB
from allmlp.training import finetune as study
from allmlp.training import loop
from allmlp.training.schedule import learning_rate, warmup_steps
from conftest import make_class_folder, tiny_model
from runs import watch_every_step
from studies import pretend

SMALL: dict[str, Any] = {"steps": 3, "batch_size": 4, "image_size": 8, "seeds": [0]}
FREE = {"device": "cpu", "data.num_workers": 0}


def make_suite_place(folder: Path) -> Path:
    """Weights of other classes; "pets" with train/ and test/, "dtd" with val/ too."""
    torch.manual_seed(0)
    am.save_model(tiny_model(4), folder / "weights")
    counts = {"ant": 8, "bee": 7, "cat": 6}
    for name, start in (("pets", 0), ("dtd", 500)):
        make_class_folder(folder / name / "train", counts, start=start)
        make_class_folder(folder / name / "test", {"ant": 3, "bee": 3, "cat": 4}, start=start + 200)
    make_class_folder(folder / "dtd" / "val", {"ant": 2, "bee": 2, "cat": 2}, start=800)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_suite_place(tmp_path)


def run(
    place: Path, output: str = "out", tasks: str = "pets dtd", **changes: Any
) -> am.SuiteResult:
    sources = {name: str(place / name) for name in tasks.split()}
    given = {**SMALL, "changes": FREE, "quiet": True, **changes}
    return am.vtab(str(place / "weights"), sources, str(place / output), **given)


class Interrupted:
    """Lets `train` count its runs, and be stopped at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.runs: list[str] = []
        self.stop_at = ""
        train = study.train

        def counted(config: am.TrainConfig, **options: bool) -> Any:
            name = "/".join(Path(str(config.output)).parts[-2:])
            if name == self.stop_at:
                raise KeyboardInterrupt
            self.runs.append(name)
            return train(config, **options)

        patch.setattr(study, "train", counted)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    watch_every_step(monkeypatch)
    monkeypatch.setattr(loop, "LOG_EVERY", 10)
    return Interrupted(monkeypatch)


@pytest.mark.slow
def test_interrupted_and_gone_on(place, watched, capsys):
    """The second task's final run is stopped: the first is not run again, and all is the same."""
    grid = {"grid": [0.01, 0.1]}
    watched.stop_at = "dtd/seed-0"
    with pytest.raises(KeyboardInterrupt):
        run(place, tasks="dtd pets", quiet=False, **grid)
    assert watched.runs == ["grid/lr-0.01", "grid/lr-0.1"]
    watched.stop_at = "pets/seed-0"
    with pytest.raises(KeyboardInterrupt):
        run(place, quiet=False, **grid)
    out = capsys.readouterr().out
    assert "goes on with the same command as before; 1 of 2 tasks are measured" in out
    half = read_measurement(place / "out" / "suite.json")
    assert list(half["tasks"]) == ["dtd"]
    assert (half["partial"], half["pending"]) == (True, ["pets"])
    watched.runs.clear()
    watched.stop_at = ""
    result = run(place, quiet=False, **grid)
    assert watched.runs == ["pets/seed-0"]
    out = capsys.readouterr().out
    assert f"done     dtd: {result.tasks['dtd']['accuracy']:.2%}" in out
    assert "mean of 2 of 19 tasks, partial: " in out
    straight = run(place, "straight", **grid)
    assert straight.tasks == result.tasks
    for name in ("pets", "dtd"):
        runs = [place / each / name / "seed-0" / "best" for each in ("out", "straight")]
        weights = [(each / "model.safetensors").read_bytes() for each in runs]
        assert weights[0] == weights[1]
    watched.runs.clear()
    again = run(place, **grid)
    assert (watched.runs, again) == ([], result)
    check_what_is_written(place, result)


def check_what_is_written(place: Path, result: am.SuiteResult) -> None:
    values = read_measurement(place / "out" / "suite.json")
    assert (values["kind"], values["checkpoint"]) == ("vtab", str(place / "weights"))
    assert values["model"]["source"] == str(place / "weights")
    assert values["tasks"] == json.loads(json.dumps(result.tasks))
    dtd, pets = values["tasks"]["dtd"], values["tasks"]["pets"]
    assert values["mean"] == result.mean == statistics.fmean([dtd["accuracy"], pets["accuracy"]])
    assert values["groups"] == {"natural": result.mean}
    assert values["missing"] == [name for name in VTAB if name not in ("pets", "dtd")]
    assert values["changes"] == [
        *("steps 3", "batch size 4", "image size 8", "grid 0.01 0.1", "seeds 0")
    ]
    assert (dtd["rule"], dtd["images"]) == ("own", {"train": 27, "held_out": 6, "test": 10})
    assert (pets["images"], pets["source"]) == (
        {"train": 21, "held_out": 4, "test": 10},
        str(place / "pets"),
    )
    assert pets["classes"] == 3
    assert pets["learning_rate"] in (0.01, 0.1)
    assert [rate for rate, _ in pets["grid"]] == [0.01, 0.1]
    log = (place / "out" / "log.txt").read_text()
    assert "note     not comparable with published means: tasks are missing and the" in log
    found = json.loads((place / "out/pets/grid/lr-0.01/validation/evaluation.json").read_text())
    assert found["images"] == 4
    assert not (place / "out" / "pets" / "grid" / "lr-0.01" / "test").exists()


Asked = list[am.TrainConfig]


def pretended(
    monkeypatch: pytest.MonkeyPatch, accuracy: Callable[[am.TrainConfig], float]
) -> Asked:
    """Nothing is trained, and no model is brought to a size."""
    monkeypatch.setattr("allmlp.studies.suite.load_model", lambda *_, **__: tiny_model(4))
    return pretend(monkeypatch, accuracy)


def by_name(asked: Asked) -> dict[str, am.TrainConfig]:
    return {"/".join(Path(str(each.output)).parts[-3:]): each for each in asked}


def test_the_papers_protocol(place, monkeypatch):
    asked = pretended(monkeypatch, lambda config: 0.5 + config.seed / 10)
    sources = {"pets": str(place / "pets"), "kitti_distance": "digits"}
    with pytest.raises(am.UserError, match="task kitti_distance: the rule takes numbers"):
        am.vtab("w", {**sources, "kitti_distance": str(place / "dtd")}, str(place / "o"))
    sources = {"pets": str(place / "pets"), "dsprites_x": "digits"}
    result = am.vtab("w", sources, str(place / "out"), changes=FREE, quiet=True)
    assert result.changes == []
    runs = by_name(asked)
    assert len(runs) == 2 * (3 + 3)
    pets, bins = runs["out/pets/seed-2"], runs["out/dsprites_x/seed-0"]
    for config in runs.values():
        assert (config.steps, config.batch_size, config.optimizer.warmup) == (2500, 512, 200)
        assert (config.optimizer.name, config.optimizer.beta1) == ("sgd", 0.9)
        assert (config.optimizer.clip_norm, config.optimizer.schedule) == (1.0, "cosine")
        assert config.data.resize == "squash"
    assert (pets.augment.crop, pets.augment.flip, pets.model.image_size) == ("random", True, 448)
    assert (bins.augment.crop, bins.augment.flip, bins.model.image_size) == ("none", False, 224)
    grid = runs["pets/grid/lr-0.003"]
    assert grid.data.source == str(place / "out" / "data" / "pets-grid.json")
    assert (grid.data.holdout, pets.data.holdout) == (None, 0.0)
    assert pets.data.source == str(place / "out" / "data" / "pets.json")
    entry = result.tasks["pets"]
    assert entry["accuracies"] == [0.5, 0.6, 0.7]
    assert (entry["accuracy"], entry["deviation"]) == (pytest.approx(0.6), pytest.approx(0.1))
    assert result.groups == {"natural": pytest.approx(0.6), "structured": pytest.approx(0.6)}


def test_the_lightweight_protocol(place, monkeypatch):
    asked = pretended(monkeypatch, lambda config: 0.5)
    given = {"changes": FREE, "quiet": True, "protocol": "lightweight"}
    result = am.vtab("w", {"pets": str(place / "pets")}, str(place / "out"), **given)
    (config,) = asked
    assert result.changes == []
    assert (config.steps, config.batch_size, config.seed) == (1000, 64, 0)
    assert (config.augment.crop, config.augment.flip) == ("none", False)
    assert (config.model.image_size, config.data.resize) == (224, "squash")
    assert (config.optimizer.clip_norm, config.optimizer.weight_decay) == (0.0, 0.0)
    assert warmup_steps(config.optimizer, 1000) == 80
    rates = [learning_rate(config.optimizer, step, 1000) for step in range(1000)]
    assert rates[40] == pytest.approx(0.005)
    ends = [rates[step] for step in (80, 300, 301, 600, 601, 900, 901, 999)]
    assert ends == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    asked.clear()
    given |= {"steps": 100, "seeds": [3]}
    result = am.vtab("w", {"pets": str(place / "pets")}, str(place / "short"), **given)
    assert result.changes == ["steps 100", "seeds 3"]
    (config,) = asked
    assert (config.seed, warmup_steps(config.optimizer, 100)) == (3, 8)
    short = [learning_rate(config.optimizer, step, 100) for step in (8, 30, 31, 91)]
    assert short == pytest.approx([1e-2, 1e-2, 1e-3, 1e-5])


def test_avg5(place, monkeypatch):
    rate = {0.003: 0.1, 0.01: 0.9, 0.03: 0.2, 0.06: 0.3}
    asked = pretended(monkeypatch, lambda config: rate[config.optimizer.learning_rate])
    sources = {name: str(place / "pets") for name in AVG5}
    result = am.transfer("w", sources, str(place / "out"), changes=FREE, quiet=True)
    runs = by_name(asked)
    assert len(runs) == 5 * (4 + 3)
    assert {name: runs[f"out/{name}/seed-0"].steps for name in AVG5} == {
        "imagenet": 20_000,
        "cifar10": 10_000,
        "cifar100": 10_000,
        "pets": 500,
        "flowers102": 500,
    }
    assert {name: runs[f"{name}/grid/lr-0.06"].data.holdout for name in AVG5} == {
        "imagenet": 0.01,
        "cifar10": 0.02,
        "cifar100": 0.02,
        "pets": 0.1,
        "flowers102": 0.1,
    }
    for name in AVG5:
        final = runs[f"out/{name}/seed-1"]
        assert (final.optimizer.learning_rate, final.data.holdout) == (0.01, 0.0)
        assert (final.model.image_size, final.data.resize) == (224, "resmall-crop")
    assert result.summary() == "mean of 5 tasks: 90.00%"
    assert (result.partial, result.changes, result.groups) == (False, [], {})
    assert result.tasks["pets"]["deviation"] == 0.0
    asked.clear()
    given = {"image_size": 448, "resize": "resize-crop", "changes": FREE, "quiet": True}
    result = am.transfer("w", {"pets": str(place / "pets")}, str(place / "large"), **given)
    assert {each.model.image_size for each in asked} == {448}
    assert {each.data.resize for each in asked} == {"resize-crop"}
    assert result.changes == []
    assert result.summary() == "mean of 1 of 5 tasks, partial: 90.00%"
    with pytest.raises(am.UserError, match="unknown suite 'vtab'"):
        am.transfer("w", {"pets": "digits"}, "o", suite="vtab")


def test_one_rate_is_taken_as_it_is(place, monkeypatch):
    asked = pretended(monkeypatch, lambda config: 0.5)
    result = run(place, tasks="pets", grid=[0.2])
    assert [each.optimizer.learning_rate for each in asked] == [0.2]
    assert asked[0].data.holdout == 0.0
    assert result.tasks["pets"]["grid"] == []
    assert result.tasks["pets"]["learning_rate"] == 0.2


def test_tasks_may_be_added(place, monkeypatch):
    asked = pretended(monkeypatch, lambda config: 0.5)
    run(place, tasks="pets", grid=[0.2])
    result = run(place, tasks="dtd", grid=[0.2])
    assert len(asked) == 2
    assert list(result.tasks) == ["dtd", "pets"]
    assert result.summary() == "mean of 2 of 19 tasks, partial: 50.00%"


def test_another_suite_is_refused(place, monkeypatch):
    pretended(monkeypatch, lambda config: 0.5)
    run(place, tasks="pets", grid=[0.2])
    before = (place / "out" / "suite.json").read_bytes()
    for changes, message in [
        ({"steps": 4}, r"changes is \['steps 3'.*\] there and \['steps 4'"),
        ({"protocol": "lightweight"}, "protocol is 'VTAB-1k, protocol paper' there and"),
        ({"seeds": [0, 1]}, r"seeds is \[0\] there and \[0, 1\] here"),
    ]:
        with pytest.raises(am.UserError, match=f"holds another suite: [^;]*;? ?.*{message}"):
            run(place, tasks="pets", **{"grid": [0.2], **changes})
    (place / "pets").rename(place / "moved")
    moved = {"pets": str(place / "moved")}
    with pytest.raises(am.UserError, match=r"the data of pets is .*/pets there and .*/moved here"):
        am.vtab(
            str(place / "weights"),
            moved,
            str(place / "out"),
            **{**SMALL, "grid": [0.2], "changes": FREE, "quiet": True},
        )
    with pytest.raises(am.UserError, match="holds another suite: it is vtab"):
        am.transfer(str(place / "weights"), moved, str(place / "out"), quiet=True)
    other = tiny_model(4, hidden_dim=32)
    monkeypatch.setattr("allmlp.studies.suite.load_model", lambda *_, **__: other)
    with pytest.raises(am.UserError, match="weights_sha256 is"):
        run(place, tasks="dtd", grid=[0.2])
    assert (place / "out" / "suite.json").read_bytes() == before


def test_all_that_is_wrong_is_said_before_the_first_run(place, monkeypatch):
    monkeypatch.setattr(study, "train", None)  # whoever trains fails
    make_class_folder(place / "svhn" / "train", {"one": 4})
    make_class_folder(place / "svhn" / "test", {"one": 4})
    for path in (place / "dtd" / "train" / "ant").iterdir():
        path.write_text("no image")
    with pytest.raises(am.UserError) as caught:
        run(place, tasks="pets dtd svhn sun397")
    lines = caught.value.what.splitlines()
    assert lines[0] == "3 of 4 tasks cannot be run:"
    assert re.match(r"  dtd: \d+ of 27 images cannot be decoded", lines[1])
    assert any(line.startswith("  sun397: no such data: ") for line in lines)
    assert any(line.startswith("  svhn: there is only one class, 'one'") for line in lines)
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "short"}, "unknown protocol 'short'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"grid": [0.1, 0.1]}, "each value counts once, got 0.1 0.1"),
        ({"grid": [0.1, float("nan")]}, "learning_rate must be a finite number"),
        ({"grid": [0.0]}, "optimizer.learning_rate must be above 0"),
        ({"seeds": [1, 1]}, "each value counts once, got 1 1"),
        ({"seeds": [-1]}, "seed must be at least 0"),
        ({"image_size": 9}, "not divisible by the patch size"),
        ({"settings": ["seed=3"]}, "seed cannot be set beside the suite's own"),
        ({"settings": ["optimizer.learning_rate=3"]}, "learning_rate cannot be set beside"),
        ({"settings": ["optimizer.nothing=3"]}, "unknown setting"),
        ({"settings": ["optimizer.warmup=10"]}, "10 steps of warm-up, and the whole run has 3"),
        ({"tasks": ""}, "no task is named"),
        ({"tasks": "petz"}, "unknown task 'petz'"),
        ({"output": "weights"}, "the folder holds something else: config.json"),
        ({"output": "file"}, "the output is a file"),
    ],
)
def test_mistakes(place, monkeypatch, changes, message):
    monkeypatch.setattr(study, "train", None)
    (place / "file").write_text("x")
    before = sorted(place.rglob("*"))
    with pytest.raises(am.UserError, match=message):
        run(place, **{"tasks": "pets", **changes})
    assert sorted(place.rglob("*")) == before


def test_no_such_checkpoint(place):
    with pytest.raises(am.UserError, match="no such model: 'nowhere'"):
        am.vtab("nowhere", {"pets": str(place / "pets")}, str(place / "out"), quiet=True)


def test_settings_that_change_nothing_are_no_change(place, monkeypatch):
    pretended(monkeypatch, lambda config: 0.5)
    given = {"grid": [0.2], "tasks": "pets"}
    result = run(place, settings=["num_threads=1", "optimizer.clip_norm=1.0"], **given)
    assert "clip" not in " ".join(result.changes)
    result = run(place, "other", settings=["augment.crop=none"], **given)
    assert "augment.crop=none" in result.changes


def test_the_means():
    done = {
        name: {"accuracy": accuracy}
        for name, accuracy in [("svhn", 0.2), ("pets", 0.4), ("eurosat", 0.9), ("dmlab", 0.1)]
    }
    result = suite_result(Path("x"), VTAB, done, [])
    assert list(result.tasks) == ["pets", "svhn", "eurosat", "dmlab"]
    assert result.mean == pytest.approx(0.4)
    assert result.groups == {"natural": pytest.approx(0.3), "specialised": 0.9, "structured": 0.1}
    assert len(result.missing) == 15
    assert result.summary() == "mean of 4 of 19 tasks, partial: 40.00%"
    whole = suite_result(Path("x"), VTAB, {name: {"accuracy": 0.5} for name in VTAB}, [])
    assert (whole.partial, whole.summary()) == (False, "mean of 19 tasks: 50.00%")
    assert suite_result(Path("x"), VTAB, {}, []).mean is None
