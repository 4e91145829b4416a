"""The studies that train from random weights: their runs, what they measure, how they resume."""

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
from allmlp.paper import studies as study_module
from allmlp.paper.studies import Study, ablations, data_scale, permutation, variants_of
from allmlp.training.dataset import open_training_data
from conftest import TINY, make_class_folder, refused
from runs import before_step, unix
from studies import note_runs, pretend

SIZES = tuple(f"model.overrides.{name}={size}" for name, size in TINY.items())
PATCH = (*SIZES, "model.overrides.patch_size=2")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data to train on and other/, to measure on."""
    make_class_folder(tmp_path / "data" / "train", {"ant": 40, "bee": 50, "cat": 30})
    make_class_folder(tmp_path / "other" / "train", {"dog": 4, "eel": 4}, start=500)
    make_class_folder(tmp_path / "other" / "test", {"dog": 3, "eel": 3}, start=600)
    return tmp_path


def run(place: Path, folder: str = "study", **changes: Any) -> Study:
    given = {"data": str(place / "data"), "few_shot_data": str(place / "other"), "shots": 2}
    given |= {"models": ["mixer_s16"], "fractions": [0.1, 1.0], "few_shot_seeds": (0, 1)}
    given |= {"image_size": 8, "steps": 6, "batch_size": 8, "evaluate_every": 2}
    given |= {"output": str(place / folder), "device": "cpu", "num_workers": 0}
    settings = (*SIZES, "optimizer.warmup=1", *changes.pop("settings", ()))
    return data_scale(quiet=True, **{**given, **changes}, settings=settings)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[am.TrainConfig]:
    """Nothing is trained: a run reaches what its settings say. Returns those asked for."""
    configs = pretend(monkeypatch, lambda config: 0.2)

    def few_shots(model: str, options: Any) -> Any:
        config = configs[-1]
        mean = 0.1 + 0.2 * config.data.fraction + 0.02 * config.seed
        mean += 0.3 * (options.shots != (2,))
        deviation = 0.03 if len(options.seeds) > 1 else None
        found = {"mean": lambda shots: mean, "deviation": lambda shots: deviation}
        return [SimpleNamespace(**found, notes=["dog has 4"])]

    monkeypatch.setattr(study_module, "few_shots", few_shots)
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
    assert first["few_shot_deviation"] == pytest.approx(np.std([0.15, 0.21], ddof=1))
    assert "changed to" in first["label"]  # its sizes are not those of its name


def test_an_interrupted_study_resumes_and_is_written_as_a_whole(
    place, asked, monkeypatch, real_figures
):
    def interrupt(name: str) -> None:
        if name == "1.0/seed-0":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        note_runs(patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(place)
    values = read_measurement(place / "study" / "data_scale.json")
    assert (values["partial"], values["missing"]) == (True, ["cells/mixer_s16/1.0/seed-0"])
    assert len(values["rows"]) == 1
    result = run(place)
    assert [config.data.fraction for config in asked] == [0.1, 1.0]
    values = read_measurement(place / "study" / "data_scale.json")
    assert (values["kind"], values["rows"]) == ("data-scale", result.rows)
    assert (values["partial"], values["missing"]) == (False, [])
    assert values["settings"]["training_images"] == 108
    cell = values["cells"]["cells/mixer_s16/0.1/seed-0"]
    assert (cell["seconds"], cell["notes"]) == (3.5, ["dog has 4"])
    assert result.rows[0]["few_shot_deviation"] == 0.03
    assert [(row["fraction"], row["images"], row["few_shot"]) for row in result.rows] == [
        (0.1, 11, 0.1 + 0.2 * 0.1),
        (1.0, 108, 0.1 + 0.2),
    ]
    pixels = np.asarray(Image.open(place / "study" / "data_scale.png").convert("L"))
    assert pixels.std() > 5
    assert "<svg" in (place / "study" / "data_scale.svg").read_text()


@unix
def test_the_folder_of_a_model_has_a_colon_only_if_an_older_version_made_it(tmp_path: Path):
    (tmp_path / "cells" / "timm:old").mkdir(parents=True)
    config = am.TrainConfig(output=str(tmp_path))
    assert study_module.folder_of("timm:new/one", config) == "timm-new-one"
    assert study_module.folder_of("timm:old", config) == "timm:old"


def test_other_few_shot_data_is_measured_again(place, asked):
    first, again = run(place), run(place, shots=1)
    found = [[row["few_shot"] for row in study.rows] for study in (first, again)]
    assert found[1] == pytest.approx([value + 0.3 for value in found[0]])


def test_validation_is_the_same_for_all(place, asked):
    run(place, fractions=[0.03, 0.1, 0.3, 1.0], seeds=[0, 1])
    validations = set()
    for config in asked:
        splits = open_training_data(config.data)
        train, validation = (
            frozenset(map(source.item_name, range(len(source))))
            for source in (splits.train, splits.validation)
        )
        validations.add(validation)
        assert not validation & train
    assert len(validations) == 1


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
        run = tmp_path / "study" / "cells" / row["model"] / row["permutation"] / "seed-0"
        top1 = json.loads((run / "test" / "evaluation.json").read_text())["top1"]
        assert (row["accuracy"], row["measured_on"], row["images"]) == (top1, "test", 359)
        assert row["few_shot"] > 0.0
        plain = next(other for other in found.rows if other["model"] == row["model"])["accuracy"]
        assert row["drop"] == pytest.approx(1 - row["accuracy"] / plain)
    cells = read_measurement(tmp_path / "study" / "permutation.json")["cells"]
    assert [step for step, _ in cells["cells/small_resnet/pixels/seed-0"]["curve"]] == [2, 4]
    with Image.open(tmp_path / "study" / "permutation.png") as figure:
        assert np.asarray(figure.convert("L")).std() > 10
    # The runs have the same weights and images to begin with, and the permutation they say.
    runs = tmp_path / "study" / "cells" / "mixer_s16"
    for kind in orders:
        assert json.loads((runs / kind / "seed-0/config.json").read_text())["seed"] == 0
        kept = am.load_model(runs / kind / "seed-0").preprocessing
        assert (kept.permutation, kept.permutation_patch) == (
            kind,
            2 if kind == "patches" else None,
        )


def variants(**settings: Any) -> dict[str, Any]:
    return variants_of(model_config("mixer_s16", **settings))


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
    loaded = am.load_model(tmp_path / "study" / "cells" / "pyramid" / "seed-1")
    assert loaded.config.pyramid == ((1, 4),)
    again = ablations(**given)
    assert [row["accuracy"] for row in again.rows] == [row["accuracy"] for row in found.rows]


def test_a_study_of_arrays_resumes_and_counts_its_own_sizes(tmp_path: Path, monkeypatch):
    rows, labels = np.random.default_rng(0).normal(size=(40, 2, 8)), np.arange(40) % 2
    np.savez(tmp_path / "rows.npz", x_train=rows, y_train=labels)
    given = digits(tmp_path / "study", data=str(tmp_path / "rows.npz"), recipe="arrays")
    sizes = tuple(size for size in SIZES if "patch_size" not in size)
    given |= {"settings": sizes, "variants": ("shared",), "quiet": True}
    speed = SimpleNamespace(name="shared", flops=1, best=None, precision="float32")
    measured = SimpleNamespace(models=[speed])
    monkeypatch.setattr(study_module, "benchmark", lambda *_, **__: measured)
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            ablations(**given)
    (row,) = ablations(**given).rows
    (run,) = (tmp_path / "study" / "cells" / "shared").iterdir()
    assert "resumed  after step 3 of 4" in (run / "log.txt").read_text()
    assert row["parameters"] == am.load_model(run).num_parameters


SCALE = "data-scale --models mixer_s16 --few-shot-data digits --set model.overrides.patch_size=2"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("permutation --patch-size 3", "8x8"),
        ("permutation --comparison mixer_s16", "mixer_s16"),
        ("permutation --set data.permutation=pixels", "data.permutation"),
        ("ablations --variants untide", "untied"),
        ("ablations --set model.overrides.token_mixing=untied", "plain Mixer"),
        (SCALE, "steps"),
        (f"{SCALE} --steps 6 --set optimizer.warmup=6", "warm-up"),
        (f"{SCALE} --steps 6 --set model.name=mixer_s16", "model.name"),
        (f"{SCALE} --steps 6 --holdout 0", "validation"),
        (f"{SCALE} --steps 6 --recipe finetune", "finetune"),
        (f"{SCALE} --steps 6 --few-shot-data digits:train", "train only"),
        (f"{SCALE} --steps 6 --output full", "thesis.txt"),
        (f"{SCALE} --steps 6 --shots 0", "shots"),
        ("ablations --seconds 0", "seconds"),
    ],
)
def test_mistakes_write_nothing(tmp_path: Path, capsys, monkeypatch, line, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "train", None)  # whoever trains fails
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    words = ["--data", "digits", "--recipe", "digits", "--output", "study", "--quiet"]
    command, *flags = line.split()
    assert named in refused(capsys, tmp_path, "paper", command, *words, *flags)
