"""The studies that train from random weights: their runs, what they measure, how they resume."""

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
from allmlp import sweep
from allmlp.evaluation.result_file import read_measurement
from allmlp.models.catalog import create_model, model_config
from allmlp.models.mixer import MixerConfig
from allmlp.paper import data_scale as data_scale_module
from allmlp.paper.ablations import ablations, variants_of
from allmlp.paper.data_scale import data_scale
from allmlp.paper.permutation import permutation, rows_of
from allmlp.paper.study import Study
from allmlp.training import train as loop
from allmlp.training.dataset import open_training_data
from conftest import TINY, make_class_folder, mixer
from runs import watch_every_step
from studies import pretend

SIZES = tuple(f"model.overrides.{name}={size}" for name, size in TINY.items())
PATCH = (*SIZES, "model.overrides.patch_size=2")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data to train on and other/, to measure on."""
    make_class_folder(tmp_path / "data" / "train", {"ant": 40, "bee": 50, "cat": 30})
    make_class_folder(tmp_path / "other" / "train", {"dog": 4, "eel": 4}, start=500)
    make_class_folder(tmp_path / "other" / "test", {"dog": 3, "eel": 3}, start=600)
    return tmp_path


# Data scale


def run(place: Path, folder: str = "study", **changes: Any) -> Study:
    given: dict[str, Any] = {
        "data": str(place / "data"),
        "few_shot_data": str(place / "other"),
        "models": ["mixer_s16"],
        "fractions": [0.1, 1.0],
        "shots": 2,
        "few_shot_seeds": (0, 1),
        "image_size": 8,
        "output": str(place / folder),
        "steps": 6,
        "batch_size": 8,
        "evaluate_every": 2,
        "device": "cpu",
        "num_workers": 0,
    }
    settings = (*SIZES, "optimizer.warmup=1", *changes.pop("settings", ()))
    return data_scale(quiet=True, **{**given, **changes}, settings=settings)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[am.TrainConfig]:
    """Nothing is trained: a run reaches what its settings say. Returns those asked for."""
    configs = pretend(monkeypatch, lambda config: 0.2)

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

    monkeypatch.setattr(data_scale_module, "few_shot", few_shot)
    monkeypatch.setattr(data_scale_module, "load_model", lambda path: path)
    return configs


def test_a_run_for_each_model_fraction_and_seed(place, asked):
    result = run(place, models=["mixer_s16", "mixer_b16"], fractions=[1.0, 0.25], seeds=[0, 3])
    assert [(c.model.name, c.data.fraction, c.seed) for c in asked] == [
        (model, fraction, seed)
        for model in ("mixer_s16", "mixer_b16")
        for fraction in (0.25, 1.0)
        for seed in (0, 3)
    ]
    assert {config.steps for config in asked} == {6}
    assert {config.data.fraction_seed for config in asked if config.data.fraction < 1} == {0, 3}
    assert {config.model.overrides["hidden_dim"] for config in asked} == {16}
    first = result.rows[0]
    # 120 images, of which 12 are held out; 6 steps of 8 images.
    assert (first["images"], first["epochs"], first["runs"]) == (27, round(48 / 27, 3), 2)
    assert first["validation"] == pytest.approx(0.9)
    assert first["few_shot"] == pytest.approx(0.18)
    assert first["deviation"] == pytest.approx(np.std([0.15, 0.21], ddof=1))
    assert first["deviation_of"] == "2 runs"
    assert "changed to" in first["label"]  # its sizes are not those of its name


def test_what_a_data_scale_study_writes(place, asked, real_figures):
    result = run(place)
    values = read_measurement(place / "study" / "data_scale.json")
    assert (values["kind"], values["points"]) == ("data-scale", result.rows)
    assert (values["partial"], values["missing"]) == (False, [])
    assert values["data"]["training_images"] == 108
    cell = values["cells"]["cells/mixer_s16/0.1/seed-0"]
    assert (cell["best_step"], cell["seconds"], cell["notes"]) == (3, 3.5, ["dog has 4"])
    assert result.rows[0]["deviation_of"] == "draws of the shots, one run"
    with (place / "study" / "data_scale.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["fraction"], row["images"], row["few_shot"]) for row in rows] == [
        ("0.1", "11", str(0.1 + 0.2 * 0.1)),
        ("1.0", "108", str(0.1 + 0.2)),
    ]
    pixels = np.asarray(Image.open(place / "study" / "data_scale.png").convert("L"))
    assert pixels.std() > 5
    assert "<svg" in (place / "study" / "data_scale.svg").read_text()
    (point, _) = run(place, "single", few_shot_seeds=(7,)).rows
    assert (point["deviation"], point["deviation_of"]) == (None, None)


def test_a_finished_run_is_never_trained_twice(place, asked):
    first = run(place)
    assert run(place).rows == first.rows
    assert len(asked) == 2
    more = run(place, models=["mixer_s16", "mixer_b16"], fractions=[0.1, 0.5, 1.0], seeds=[0, 1])
    assert (len(asked), len(more.rows)) == (12, 6)


def test_after_an_interruption_the_missing_runs_are_trained(place, asked, monkeypatch):
    train = sweep.train

    def interrupted(config, **options):
        if config.data.fraction == 1.0:
            raise KeyboardInterrupt
        return train(config, **options)

    monkeypatch.setattr(sweep, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(place)
    values = read_measurement(place / "study" / "data_scale.json")
    assert (values["partial"], values["missing"]) == (True, ["cells/mixer_s16/1.0/seed-0"])
    assert len(values["points"]) == 1
    monkeypatch.setattr(sweep, "train", train)
    result = run(place)
    assert [config.data.fraction for config in asked] == [0.1, 1.0]
    assert result.rows == run(place, "straight").rows


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
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    again = run(place)
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    log = (place / "study" / "cells" / "mixer_s16" / "1.0" / "seed-0" / "log.txt").read_text()
    assert "resumed  after step 4 of 6" in log
    for one, other in zip(again.rows, straight.rows, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def names(config: am.TrainConfig) -> tuple[set[str], set[str]]:
    """The images that a run trains on, and those that it validates on."""
    splits = open_training_data(config.data)
    assert splits.validation is not None
    return (
        {splits.train.item_name(at) for at in range(len(splits.train))},
        {splits.validation.item_name(at) for at in range(len(splits.validation))},
    )


def test_subsets_are_nested_and_validation_is_the_same_for_all(place, asked):
    run(place, fractions=[0.03, 0.1, 0.3, 1.0], seeds=[0, 1])
    by_seed = {seed: [names(config) for config in asked if config.seed == seed] for seed in (0, 1)}
    for found in by_seed.values():
        trains = [train for train, _ in found]
        assert [len(train) for train in trains] == [3, 11, 32, 108]
        for small, large in itertools.pairwise(trains):
            assert small < large
    validations = {frozenset(own) for found in by_seed.values() for _, own in found}
    assert len(validations) == 1
    assert not next(iter(validations)) & by_seed[0][-1][0]
    assert by_seed[0][1][0] != by_seed[1][1][0]  # another seed draws other images


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"models": []}, "model"),
        ({"models": ["mixer_x9"]}, "mixer_x9"),
        ({"fractions": [0.0, 1.0]}, "fraction.*0.0"),
        ({"fractions": [1.5]}, "fraction.*1.5"),
        ({"fractions": [float("nan")]}, "fraction.*nan"),
        ({"seeds": [-1]}, "seed"),
        ({"seeds": []}, "seed"),
        ({"shots": 0}, "shots"),
        ({"few_shot_seeds": [-3]}, "-3"),
        ({"few_shot_data": "nowhere"}, "nowhere"),
        ({"few_shot_data": "DATA"}, "test"),
        ({"data": "nowhere"}, "nowhere"),
        ({"holdout": 0.0}, "validation"),
        ({"steps": None}, "steps"),
        ({"image_size": 9}, "patch size"),
        ({"settings": ["optimizer.warmup=6"]}, "warm-up"),
        ({"settings": ["model.name=mixer_s16"]}, "model.name"),
        ({"settings": ["data.fraction=0.5"]}, "data.fraction"),
        ({"settings": ["model.weights=w"]}, "model.weights"),
        ({"recipe": "finetune"}, "finetune"),
        ({"output": "FILE"}, "file"),
        ({"output": "FULL"}, "thesis.txt"),
    ],
)
def test_mistakes_write_nothing(place, changes, named):
    (place / "file").write_text("x")
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").write_text("x")
    places = {"FILE": place / "file", "FULL": place / "full", "DATA": place / "data"}
    changes = {
        key: str(places[value]) if isinstance(value, str) and value in places else value
        for key, value in changes.items()
    }
    before = sorted(place.rglob("*"))
    with pytest.raises(am.UserError, match=named):
        run(place, **changes)
    assert sorted(place.rglob("*")) == before


# Permutation


def digits(folder: Path, **changes: Any) -> dict[str, Any]:
    """Four steps of a tiny Mixer on the digits."""
    given: dict[str, Any] = {"data": "digits", "recipe": "digits", "output": str(folder)}
    given |= {"steps": 4, "evaluate_every": 2, "batch_size": 16, "num_workers": 0}
    return {**given, "settings": PATCH, **changes}


@pytest.mark.slow
def test_the_permutation_study_from_start_to_figure(tmp_path: Path, real_figures):
    small = ("width=8", "num_stages=1", "num_blocks=1")
    few = {"few_shot_data": "digits", "shots": 1}
    found = permutation(quiet=True, **digits(tmp_path / "study"), comparison_set=small, **few)
    kinds = [(row["model"], row["permutation"]) for row in found.rows]
    orders = ("none", "patches", "pixels")
    assert kinds == [(model, kind) for model in ("mixer_s16", "small_resnet") for kind in orders]
    for row in found.rows:
        assert 0.0 <= row["accuracy"] <= 1.0
        assert (row["measured_on"], row["images"]) == ("test", 359)
        assert row["few_shot"] > 0.0
        plain = next(other for other in found.rows if other["model"] == row["model"])["accuracy"]
        assert row["drop"] == pytest.approx(1 - row["accuracy"] / plain)
    values = read_measurement(tmp_path / "study" / "permutation.json")
    assert (values["kind"], values["partial"], values["rows"]) == ("permutation", False, found.rows)
    cell = values["cells"]["cells/small_resnet/pixels/seed-0"]
    assert [step for step, _ in cell["curve"]] == [2, 4]
    with Image.open(tmp_path / "study" / "permutation.png") as figure:
        assert np.asarray(figure.convert("L")).std() > 10
    # The runs have the same weights and images to begin with, and the permutation they say.
    runs = tmp_path / "study" / "cells" / "mixer_s16"
    for kind in orders:
        assert json.loads((runs / kind / "seed-0/config.json").read_text())["seed"] == 0
        kept = am.load_model(runs / kind / "seed-0").preprocessing
        assert kept is not None
        assert (kept.permutation, kept.permutation_patch) == (
            kind,
            2 if kind == "patches" else None,
        )


@pytest.mark.slow
def test_an_interrupted_permutation_study_resumes(tmp_path: Path, monkeypatch):
    reached = {"none": 0.8, "patches": 0.7, "pixels": 0.4}
    trained = pretend(monkeypatch, lambda config: reached[config.data.permutation or "none"])
    train = sweep.train

    def stopped(config: am.TrainConfig, **options: bool) -> Any:
        if config.data.permutation == "patches":
            raise KeyboardInterrupt
        return train(config, **options)

    monkeypatch.setattr(sweep, "train", stopped)
    given = digits(tmp_path / "a", comparison="none", quiet=True)
    with pytest.raises(KeyboardInterrupt):
        permutation(**given)
    values = read_measurement(tmp_path / "a" / "permutation.json")
    assert [name.split("/")[2] for name in values["missing"]] == ["patches", "pixels"]
    monkeypatch.setattr(sweep, "train", train)
    found = permutation(**given)
    assert [config.data.permutation for config in trained] == ["none", "patches", "pixels"]
    assert [row["accuracy"] for row in found.rows] == [0.8, 0.7, 0.4]
    assert [row["drop"] for row in found.rows] == pytest.approx([0.0, 1 / 8, 1 / 2])
    permutation(**{**given, "permutation_seed": 1})
    assert [config.data.permutation for config in trained[3:]] == ["patches", "pixels"]


def test_drops_are_relative_and_need_the_plain_run():
    runs = [("m", "none", 0.8), ("m", "none", 0.6), ("m", "pixels", 0.4), ("m", "pixels", 0.2)]
    found = rows_of(
        {"model": name, "permutation": kind, "accuracy": top1, "measured_on": "test", "images": 9}
        for name, kind, top1 in [*runs, ("r", "pixels", 0.5)]
    )
    rows = {(row["model"], row["permutation"]): row for row in found}
    assert rows["m", "pixels"]["drop"] == pytest.approx(1 - 0.3 / 0.7)
    assert rows["m", "pixels"]["deviation"] == pytest.approx(0.2 / 2**0.5)
    assert rows["r", "pixels"]["drop"] is None


# Ablations


def variants(**settings: Any) -> dict[str, Any]:
    config = model_config("mixer_s16", **settings)
    assert isinstance(config, MixerConfig)
    return variants_of(config)


def test_the_variants_are_those_that_a_model_can_have():
    full = variants(image_size=32, patch_size=4)
    expected = ["shared", "untied", "grouped-2", "grouped-4", "views-2", "views-4", "pyramid"]
    assert list(full) == expected
    assert full["pyramid"] == {"pyramid": ((4, 16),)}
    for settings in full.values():
        create_model("mixer_s16", 32, 2, **{**TINY, "patch_size": 4, "num_blocks": 6, **settings})
    odd = variants(image_size=16, patch_size=16, hidden_dim=50)
    assert list(odd) == ["shared", "untied", "grouped-2", "views-2"]


@pytest.mark.slow
def test_the_ablations_measure_accuracy_and_cost(tmp_path: Path):
    chosen = ("shared", "untied", "pyramid")
    given = digits(tmp_path / "study", variants=chosen, seeds=(0, 1), seconds=0.05, quiet=True)
    found = ablations(**given)
    shared, untied, pyramid = found.rows
    for name, row in zip(chosen, found.rows, strict=True):
        assert (row["variant"], row["runs"]) == (name, 2)
        assert row["deviation"] is not None
        assert row["images_per_second"] > 0
    # 16 channels: a token-mixing MLP of their own each, in 2 blocks of 16 tokens, 8 hidden units
    assert untied["parameters"] - shared["parameters"] == 15 * 2 * (17 * 8 + 9 * 16)
    assert untied["flops"] == shared["flops"]
    assert pyramid["flops"] < shared["flops"]
    with (tmp_path / "study" / "ablations.csv").open(newline="") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == [*chosen]
    values = read_measurement(tmp_path / "study" / "ablations.json")
    assert (values["partial"], values["rows"]) == (False, found.rows)
    loaded = am.load_model(tmp_path / "study" / "cells" / "pyramid" / "seed-1")
    assert loaded.config.pyramid == ((1, 4),)
    again = ablations(**given)
    assert [row["accuracy"] for row in again.rows] == [row["accuracy"] for row in found.rows]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("permutation --patch-size 3", "8x8"),
        ("permutation --comparison-set width=9", "multiple of 8"),
        ("permutation --comparison-set width", "KEY=VALUE"),
        ("permutation --comparison mixer_s16", "mixer_s16"),
        ("permutation --comparison resnet", "resnet"),
        ("permutation --set data.permutation=pixels", "data.permutation"),
        ("permutation --few-shot-data nowhere", "nowhere"),
        ("ablations --variants untide", "untied"),
        ("ablations --model vip_s7 --image-size 14", "plain Mixer"),
        ("ablations --set model.overrides.token_mixing=untied", "plain Mixer"),
        ("ablations --recipe finetune", "finetune"),
    ],
)
def test_mistakes_of_the_commands_write_nothing(tmp_path: Path, capsys, arguments, named):
    command, *rest = arguments.split()
    rest += [] if "--recipe" in rest else ["--recipe", "digits"]
    line = ("paper", command, "--data", "digits", "--output", tmp_path / "study", *rest)
    code, _, err = mixer(capsys, *line)
    assert code == 2
    assert named in err
    assert not (tmp_path / "study").exists()
