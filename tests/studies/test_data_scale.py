"""The data-scale study: which runs it makes, what it measures, and how it goes on."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import allmlp as am
from allmlp.evaluation.measurement import read_measurement
from allmlp.studies import data_scale as study
from allmlp.studies.data_scale import DataScale, data_scale
from allmlp.training import loop
from allmlp.training.dataset import open_training_data
from conftest import TINY, make_class_folder
from runs import watch_every_step

COUNTS = {"ant": 40, "bee": 50, "cat": 30}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data to train on and other/, to measure on."""
    make_class_folder(tmp_path / "data" / "train", COUNTS)
    make_class_folder(tmp_path / "other" / "train", {"dog": 4, "eel": 4}, start=500)
    make_class_folder(tmp_path / "other" / "test", {"dog": 3, "eel": 3}, start=600)
    return tmp_path


def settings(place: Path, folder: str = "study", **changes: object) -> am.TrainConfig:
    values: dict[str, object] = {
        "model.name": "any",
        "model.image_size": 8,
        "model.overrides": TINY,
        "data.source": str(place / "data"),
        "output": str(place / folder),
        "steps": 6,
        "batch_size": 8,
        "evaluate_every": 2,
        "optimizer.warmup": 1,
        "device": "cpu",
        "data.num_workers": 0,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return am.recipe("scratch").with_values(values)


def run(place: Path, folder: str = "study", **changes: Any) -> DataScale:
    named = {"models": ["mixer_s16"], "fractions": [0.1, 1.0], "seeds": [0], "shots": 2}
    options = {key: changes.pop(key, value) for key, value in named.items()}
    options["few_shot_seeds"] = changes.pop("few_shot_seeds", (0, 1))
    other = changes.pop("few_shot_data", str(place / "other"))
    return data_scale(settings(place, folder, **changes), other, quiet=True, **options)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[am.TrainConfig]:
    """Nothing is trained: a run reaches what its name says. Returns those that were asked for."""
    configs: list[am.TrainConfig] = []

    def train(config: am.TrainConfig, *, quiet: bool, in_study: bool) -> Any:
        assert in_study
        configs.append(config)
        folder = Path(str(config.output))
        folder.mkdir(parents=True)
        top1 = 0.2 + 0.5 * config.data.fraction + 0.01 * config.seed
        (folder / "results.csv").write_text(
            f"step,seconds,best,validation_top1\n2,1.0,0,0.1\n4,2.0,1,{top1}\n6,3.5,0,0.1\n"
        )
        return SimpleNamespace(validation=SimpleNamespace(top1=top1))

    def few_shot(model: Path, data: str, *, shots: tuple[int, ...], seeds: Any, **_: Any) -> Any:
        config = configs[-1]
        mean = 0.1 + 0.2 * config.data.fraction + 0.02 * config.seed
        return SimpleNamespace(
            mean=lambda number: mean,
            deviation=lambda number: 0.03 if len(seeds) > 1 else None,
            accuracies={shots[0]: dict.fromkeys(seeds, mean)},
            test_split="test",
            num_test=6,
            num_classes=2,
            notes=["dog has 4"],
        )

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "few_shot", few_shot)
    monkeypatch.setattr(study, "load_model", lambda path: path)
    return configs


def test_a_run_for_each_model_share_and_seed(place, asked):
    result = run(place, models=["mixer_s16", "mixer_b16"], fractions=[1.0, 0.25], seeds=[0, 3])
    assert [(c.model.name, c.data.fraction, c.seed) for c in asked] == [
        (model, fraction, seed)
        for model in ("mixer_s16", "mixer_b16")
        for fraction in (0.25, 1.0)
        for seed in (0, 3)
    ]
    assert {each.steps for each in asked} == {6}
    assert {each.data.fraction_seed for each in asked if each.data.fraction < 1} == {0, 3}
    assert {each.model.overrides["hidden_dim"] for each in asked} == {16}
    first = result.points[0]
    # 120 images, of which 12 are held out; 6 steps of 8 images.
    assert (first["images"], first["epochs"], first["runs"]) == (27, round(48 / 27, 3), 2)
    assert first["validation"] == pytest.approx(0.34)
    assert first["few_shot"] == pytest.approx(0.18)
    assert first["deviation"] == pytest.approx(np.std([0.15, 0.21], ddof=1))
    assert first["deviation_of"] == "2 runs"
    assert "changed to" in first["label"]  # its sizes are not those of its name


def test_what_is_written(place, asked):
    result = run(place)
    values = read_measurement(place / "study" / "data_scale.json")
    assert values["kind"] == "data-scale"
    assert values["points"] == result.points
    assert (values["partial"], values["missing"]) == (False, [])
    assert values["data"]["training_images"] == 108
    cell = values["cells"]["cells/mixer_s16/0.1/seed-0"]
    assert (cell["best_step"], cell["seconds"], cell["notes"]) == (4, 3.5, ["dog has 4"])
    assert result.points[0]["deviation_of"] == "draws of the shots, one run"
    with (place / "study" / "data_scale.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["fraction"], row["images"], row["few_shot"]) for row in rows] == [
        ("0.1", "11", str(0.1 + 0.2 * 0.1)),
        ("1.0", "108", str(0.1 + 0.2)),
    ]
    pixels = np.asarray(Image.open(place / "study" / "data_scale.png").convert("L"))
    assert pixels.std() > 5
    assert "<svg" in (place / "study" / "data_scale.svg").read_text()


def test_one_draw_has_no_deviation(place, asked):
    (point, _) = run(place, few_shot_seeds=(7,)).points
    assert (point["deviation"], point["deviation_of"]) == (None, None)


def test_a_finished_cell_is_never_run_twice(place, asked):
    first = run(place)
    assert len(asked) == 2
    assert run(place).points == first.points
    assert len(asked) == 2
    more = run(place, models=["mixer_s16", "mixer_b16"], fractions=[0.1, 0.5, 1.0], seeds=[0, 1])
    assert len(asked) == 12
    assert len(more.points) == 6
    with pytest.raises(am.UserError, match="seed-1 is there and not asked for"):
        run(place, models=["mixer_s16", "mixer_b16"], fractions=[0.1, 0.5, 1.0])


def test_after_an_interruption_the_missing_cells_are_run(place, asked, monkeypatch, capsys):
    train = study.train

    def interrupted(config, **options):
        if config.data.fraction == 1.0:
            raise KeyboardInterrupt
        return train(config, **options)

    monkeypatch.setattr(study, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(place)
    values = read_measurement(place / "study" / "data_scale.json")
    assert (values["partial"], values["missing"]) == (True, ["cells/mixer_s16/1.0/seed-0"])
    assert len(values["points"]) == 1
    log = (place / "study" / "log.txt").read_text()
    assert "the study goes on with the same command as before" in log
    monkeypatch.setattr(study, "train", train)
    result = run(place)
    assert [each.data.fraction for each in asked] == [0.1, 1.0]
    assert result.points == run(place, "straight").points
    assert (
        "done     cells/mixer_s16/0.1/seed-0: validation 25.00%"
        in (place / "study" / "log.txt").read_text()
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals as Unix has them")
def test_a_study_that_was_stopped_ends_like_one_that_was_not(place, monkeypatch):
    watch_every_step(monkeypatch)
    straight = run(place, "straight")
    train_step = loop.Trainer.train_step

    def stopped(self, number, batch):
        if number == 3 and "1.0" in str(self.run_folder.path):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, number, batch)

    monkeypatch.setattr(loop.Trainer, "train_step", stopped)
    with pytest.raises(SystemExit):
        run(place)
    monkeypatch.setattr(loop.Trainer, "train_step", train_step)
    first = place / "study" / "cells" / "mixer_s16" / "0.1"
    before = {each: each.stat().st_mtime_ns for each in first.rglob("*")}
    again = run(place)
    assert {each: each.stat().st_mtime_ns for each in first.rglob("*")} == before
    log = (place / "study" / "cells" / "mixer_s16" / "1.0" / "seed-0" / "log.txt").read_text()
    assert "resumed  after step 4 of 6" in log
    for one, other in zip(again.points, straight.points, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert 0.0 <= again.points[0]["few_shot"] <= 1.0


def names(config: am.TrainConfig) -> tuple[set[str], set[str]]:
    """The images that a run trains on, and those that it validates on."""
    splits = open_training_data(config.data)
    assert splits.validation is not None
    return (
        {splits.train.item_name(at) for at in range(len(splits.train))},
        {splits.validation.item_name(at) for at in range(len(splits.validation))},
    )


def test_shares_are_nested_and_validation_is_the_same_for_all(place, asked):
    run(place, fractions=[0.03, 0.1, 0.3, 1.0], seeds=[0, 1])
    by_seed = {seed: [names(each) for each in asked if each.seed == seed] for seed in (0, 1)}
    for found in by_seed.values():
        trains = [train for train, _ in found]
        assert [len(each) for each in trains] == [3, 11, 32, 108]
        for small, large in itertools.pairwise(trains):
            assert small < large
    validations = {frozenset(each) for found in by_seed.values() for _, each in found}
    assert len(validations) == 1
    assert not next(iter(validations)) & by_seed[0][-1][0]
    assert by_seed[0][1][0] != by_seed[1][1][0]  # another seed draws other images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "at least one value is needed"),
        ({"models": ["mixer_s16", "mixer_s16"]}, "each value counts once, got mixer_s16 mixer_s16"),
        ({"models": ["mixer_x9"]}, "unknown model 'mixer_x9'"),
        ({"fractions": [0.0, 1.0]}, "data.fraction must be above 0, at most 1, got 0.0"),
        ({"fractions": [1.5]}, "data.fraction must be above 0, at most 1, got 1.5"),
        ({"fractions": [float("nan")]}, "data.fraction must be a finite number, got nan"),
        ({"seeds": [-1]}, "must be at least 0"),
        ({"shots": 0}, "shots are whole numbers of at least 1, got 0"),
        ({"few_shot_seeds": [-3]}, "seeds are whole numbers of at least 0, got -3"),
        ({"few_shot_data": "nowhere"}, "no such data: 'nowhere'"),
        ({"few_shot_data": "DATA"}, "there is no test and no validation split"),
        ({"data__source": "nowhere"}, "no such data: 'nowhere'"),
        ({"data__holdout": 0.0}, "the best weights are chosen by validation images"),
        ({"data__fraction": 0.5}, "data.fraction=0.5 has no effect beside the study's own shares"),
        (
            {"steps": None, "epochs": 3, "evaluate_every": 1},
            "every run of the study has the same number of steps",
        ),
        ({"optimizer__warmup": 6}, "it would never reach its learning rate"),
        ({"model__image_size": 9}, "not divisible by the patch size"),
        ({"model__weights": "w", "model__name": "", "model__overrides": {}}, "from random weights"),
        ({"output": None}, "needs a folder with a name"),
        ({"output": "FILE"}, "the output is a file"),
        ({"output": "FULL"}, "the folder holds something else: thesis.txt"),
        ({"output": "DAMAGED"}, "not a measurement"),
        ({"output": "OTHER"}, "not the results of a data-scale study: it is of the kind 'vtab'"),
    ],
)
def test_mistakes_write_nothing(place, changes, message):
    (place / "file").write_text("x")
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").write_text("x")
    for name, text in (("damaged", "{"), ("other_kind", json.dumps(OTHER))):
        (place / name).mkdir()
        (place / name / "data_scale.json").write_text(text)
    places = {"FILE": "file", "FULL": "full", "DAMAGED": "damaged", "OTHER": "other_kind"}
    changes = dict(changes)
    if changes.get("few_shot_data") == "DATA":
        changes["few_shot_data"] = str(place / "data")
    if "output" in changes:
        name = changes.pop("output")
        changes["output"] = None if name is None else str(place / places[name])
    before = sorted(place.rglob("*"))
    with pytest.raises(am.UserError, match=message):
        run(place, **changes)
    assert sorted(place.rglob("*")) == before


OTHER = {"format": "allmlp measurement", "version": 1, "kind": "vtab"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 8}, "steps is 6 there and 8 here"),
        ({"shots": 3}, "shots is 2 there and 3 here"),
        ({"few_shot_seeds": (0,)}, r"few_shot_seeds is \[0, 1\] there and \[0\] here"),
        ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate is 0.001 there"),
        ({"fractions": [1.0]}, "cells/mixer_s16/0.1/seed-0 is there and not asked for"),
    ],
)
def test_a_folder_of_another_study_is_refused(place, asked, changes, message):
    run(place)
    before = (place / "study" / "data_scale.json").read_bytes()
    with pytest.raises(am.UserError, match=message):
        run(place, **changes)
    assert (place / "study" / "data_scale.json").read_bytes() == before
    assert len(asked) == 2
