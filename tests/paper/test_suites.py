"""Suites of fine-tuning: what each run is given, the means, and how a suite resumes."""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import allmlp as am
from allmlp import sweep
from allmlp.evaluation.result_file import read_measurement
from allmlp.paper.suites import SuiteResult, avg5, vtab
from allmlp.paper.tasks import AVG5, VTAB
from allmlp.training import train as loop
from allmlp.training.optim import learning_rate, warmup_steps
from conftest import make_class_folder, tiny_model
from runs import watch_every_step
from studies import note_runs, pretend

FREE: dict[str, Any] = {"device": "cpu", "num_workers": 0, "quiet": True}
SMALL: dict[str, Any] = {"steps": 3, "batch_size": 4, "image_size": 8, "seeds": [0]}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Weights of other classes; "pets" with train/ and test/, "dtd" with val/ too."""
    torch.manual_seed(0)
    am.save_model(tiny_model(4), tmp_path / "weights")
    counts = {"ant": 8, "bee": 7, "cat": 6}
    for name, start in (("pets", 0), ("dtd", 500)):
        make_class_folder(tmp_path / name / "train", counts, start=start)
        test = {"ant": 3, "bee": 3, "cat": 4}
        make_class_folder(tmp_path / name / "test", test, start=start + 200)
    make_class_folder(tmp_path / "dtd" / "val", {"ant": 2, "bee": 2, "cat": 2}, start=800)
    return tmp_path


def run(place: Path, output: str = "out", tasks: str = "pets dtd", **changes: Any) -> SuiteResult:
    sources = {name: str(place / name) for name in tasks.split()}
    given = {**SMALL, **FREE, "output": str(place / output), "tasks": sources, **changes}
    return vtab(str(place / "weights"), **given)


@pytest.mark.slow
def test_interrupted_and_resumed(place, monkeypatch):
    """The second task's final run is stopped: the first is not run again, and all is the same."""
    watch_every_step(monkeypatch)
    monkeypatch.setattr(loop, "LOG_EVERY", 10)
    stop_at = "dtd/seed-0"

    def interrupt(name: str) -> None:
        if name == stop_at:
            raise KeyboardInterrupt

    runs = note_runs(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(place, grid=[0.01, 0.1])
    none = read_measurement(place / "out" / "suite.json")
    assert (none["mean"], len(none["missing"])) == (None, 19)
    stop_at = "pets/seed-0"
    with pytest.raises(KeyboardInterrupt):
        run(place, grid=[0.01, 0.1])
    assert runs == [*(grid := ["grid/lr-0.01", "grid/lr-0.1"]), "dtd/seed-0", *grid]
    half = read_measurement(place / "out" / "suite.json")
    assert (list(half["tasks"]), half["partial"]) == (["dtd"], True)
    runs.clear()
    stop_at = ""
    result = run(place, grid=[0.01, 0.1])
    assert runs == ["pets/seed-0"]
    runs.clear()
    assert (run(place, grid=[0.01, 0.1]), runs) == (result, [])
    values = read_measurement(place / "out" / "suite.json")
    assert (values["kind"], values["checkpoint"]) == ("vtab", str(place / "weights"))
    assert values["tasks"] == json.loads(json.dumps(result.tasks))
    dtd, pets = values["tasks"]["dtd"], values["tasks"]["pets"]
    assert values["mean"] == result.mean == statistics.fmean([dtd["accuracy"], pets["accuracy"]])
    assert values["groups"] == {"natural": result.mean}
    assert values["missing"] == [name for name in VTAB if name not in ("pets", "dtd")]
    expected = {"steps=3", "batch_size=4", "model.image_size=8", "grid 0.01 0.1", "seeds 0"}
    assert expected <= {*values["changes"]}
    assert (dtd["rule"], dtd["images"]) == ("own", {"train": 27, "held_out": 6, "test": 10})
    assert pets["images"] == {"train": 21, "held_out": 4, "test": 10}
    assert (pets["source"], pets["classes"]) == (str(place / "pets"), 3)
    assert pets["learning_rate"] in (0.01, 0.1)
    assert not (place / "out" / "pets" / "grid" / "lr-0.01" / "test").exists()


Asked = list[am.TrainConfig]


def pretended(
    monkeypatch: pytest.MonkeyPatch, accuracy: Callable[[am.TrainConfig], float]
) -> Asked:
    """Nothing is trained, and no model is resized."""
    monkeypatch.setattr("allmlp.paper.suites.load_model", lambda *_, **__: tiny_model(4))
    monkeypatch.setattr("allmlp.sweep.weights_fingerprint", lambda source, **_: source)
    return pretend(monkeypatch, accuracy)


def by_name(asked: Asked) -> dict[str, am.TrainConfig]:
    return {"/".join(Path(str(config.output)).parts[-3:]): config for config in asked}


def test_the_papers_protocol(place, monkeypatch):
    asked = pretended(monkeypatch, lambda c: c.seed / 10 + (0.5 if c.augment.flip else 0.2))
    sources = {"pets": str(place / "pets"), "dsprites_x": "digits"}
    result = vtab("w", tasks=sources, output=str(place / "out"), **FREE)
    assert result.changes == []
    runs = by_name(asked)
    assert len(runs) == 2 * (3 + 3)
    pets, bins = runs["out/pets/seed-2"], runs["out/dsprites_x/seed-0"]
    for config in runs.values():
        assert (config.steps, config.batch_size, config.optimizer.warmup) == (2500, 512, 200)
        assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.9)
        assert (config.optimizer.clip_norm, config.optimizer.schedule.name) == (1.0, "cosine")
        assert config.data.resize == "squash"
    for run, expected in ((pets, ("random", True, 448)), (bins, ("none", False, 224))):
        assert (run.augment.crop.name, run.augment.flip, run.model.image_size) == expected
    grid = runs["pets/grid/lr-0.003"]
    sources = [Path(run.data.source).name for run in (grid, pets)]
    assert sources == ["pets-grid.json", "pets.json"]
    assert (grid.data.holdout, pets.data.holdout) == (None, 0.0)
    entry = result.tasks["pets"]
    assert entry["accuracies"] == [0.5, 0.6, 0.7]
    assert (entry["accuracy"], entry["deviation"]) == (pytest.approx(0.6), pytest.approx(0.1))
    assert result.groups == {"natural": pytest.approx(0.6), "structured": pytest.approx(0.3)}
    assert result.mean == pytest.approx(0.45)
    done = {n: {"accuracy": a} for n, a in (("svhn", 0.2), ("pets", 0.4), ("eurosat", 0.9))}
    result = SuiteResult(Path("x"), VTAB, done, [])
    assert result.mean == pytest.approx(0.5)
    assert result.groups == {"natural": pytest.approx(0.3), "specialised": 0.9}


def test_the_lightweight_protocol(place, monkeypatch):
    asked = pretended(monkeypatch, lambda config: 0.5)
    given: dict[str, Any] = {**FREE, "protocol": "lightweight", "tasks": {"pets": place / "pets"}}
    result = vtab("w", output=str(place / "out"), **given)
    (config,) = asked  # a single rate needs no grid
    assert result.changes == []
    assert (config.steps, config.batch_size, config.seed) == (1000, 64, 0)
    assert (config.optimizer.learning_rate, config.data.holdout) == (0.01, 0.0)
    assert (config.model.image_size, config.data.resize) == (224, "squash")
    assert config.optimizer.clip_norm == 0.0
    assert warmup_steps(config.optimizer, 1000) == 80
    rates = [learning_rate(config.optimizer, step, 1000) for step in (40, 80, 300, 301, 601, 999)]
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2, 1e-3, 1e-4, 1e-5])
    asked.clear()
    result = vtab("w", output=str(place / "short"), steps=100, seeds=(3,), **given)
    assert {"steps=100", "seeds 3"} <= {*result.changes}
    (config,) = asked
    assert (config.seed, warmup_steps(config.optimizer, 100)) == (3, 8)
    short = [learning_rate(config.optimizer, step, 100) for step in (8, 30, 31, 91)]
    assert short == pytest.approx([1e-2, 1e-2, 1e-3, 1e-5])


def test_avg5(place, monkeypatch):
    rate = {0.003: 0.1, 0.01: 0.9, 0.03: 0.2, 0.06: 0.3}
    asked = pretended(monkeypatch, lambda config: rate[config.optimizer.learning_rate])
    sources = {name: str(place / "pets") for name in AVG5}
    result = avg5("w", tasks=sources, output=str(place / "out"), **FREE)
    runs = by_name(asked)
    assert len(runs) == 5 * (4 + 3)
    steps = [runs[f"out/{name}/seed-0"].steps for name in AVG5]
    assert steps == [20_000, 10_000, 10_000, 500, 500]
    held_out = [runs[f"{name}/grid/lr-0.06"].data.holdout for name in AVG5]
    assert held_out == [0.01, 0.02, 0.02, 0.1, 0.1]
    for name in AVG5:
        final = runs[f"out/{name}/seed-1"]
        assert (final.optimizer.learning_rate, final.data.holdout) == (0.01, 0.0)
        data = final.data
        assert (final.model.image_size, data.resize, data.crop) == (224, "resmall-crop", 0.875)
    assert result.summary() == "mean of 5 tasks: 90.00%"
    assert (result.missing, result.changes, result.groups) == ([], [], {})
    asked.clear()
    given = {"image_size": 448, "resize": "resize-crop", "output": str(place / "large"), **FREE}
    result = avg5("w", tasks={"pets": str(place / "pets")}, **given)
    assert {config.model.image_size for config in asked} == {448}
    assert {config.data.resize for config in asked} == {"resize-crop"}
    assert result.changes == []
    assert result.summary() == "mean of 1 of 5 tasks, partial: 90.00%"


def test_tasks_may_be_added_and_other_settings_are_other_runs(place, monkeypatch):
    asked = pretended(monkeypatch, lambda config: 0.5 + config.batch_size / 100)
    first = run(place, tasks="pets", grid=[0.2])
    assert list(run(place, tasks="dtd", grid=[0.2]).tasks) == ["dtd", "pets"]
    assert len(asked) == 2
    other = run(place, tasks="pets", grid=[0.2], batch_size=8)
    assert list(other.tasks) == ["pets"]
    assert other.mean != first.mean
    assert run(place, tasks="pets", grid=[0.2]).tasks == first.tasks
    assert len(asked) == 3
    weights = tiny_model(4, hidden_dim=32)
    monkeypatch.setattr("allmlp.paper.suites.load_model", lambda *_, **__: weights)
    with pytest.raises(am.UserError, match="weights"):
        run(place, tasks="dtd", grid=[0.2])


def test_all_that_is_wrong_is_reported_before_the_first_run(place, monkeypatch):
    monkeypatch.setattr(sweep, "train", None)  # whoever trains fails
    make_class_folder(place / "svhn" / "train", {"one": 4})
    make_class_folder(place / "svhn" / "test", {"one": 4})
    for path in (place / "dtd" / "train" / "ant").iterdir():
        path.write_text("no image")
    with pytest.raises(am.UserError) as caught:
        run(place, tasks="pets dtd svhn sun397")
    text = caught.value.what
    assert text.startswith("3 of 4 tasks")
    assert re.search(r"dtd: \d+ of 27 images", text)
    assert all(name in text for name in ("sun397: ", "svhn: "))
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"grid": [0.1, float("nan")]}, "learning_rate"),
        ({"image_size": 9}, "patch size"),
        ({"settings": ["seed=3"]}, "seed"),
        ({"output": "weights"}, "config.json"),
    ],
)
def test_mistakes(place, monkeypatch, changes, named):
    monkeypatch.setattr(sweep, "train", None)
    before = sorted(place.rglob("*"))
    with pytest.raises(am.UserError, match=named):
        run(place, **{"tasks": "pets", **changes})
    assert sorted(place.rglob("*")) == before
