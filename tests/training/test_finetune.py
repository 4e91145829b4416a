"""Fine-tuning studies: the grid and its held-out images, the seeds, and how a study goes on."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

import allmlp as am
from allmlp.training import finetune as study
from allmlp.training.summary import TrainResult
from conftest import draw, make_class_folder
from studies import COUNTS, make_place, pretend, settings


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, am.FinetuneResult]:
    """A study of two rates and two seeds; while its grid runs there are no test images at all."""
    place = make_place(tmp_path_factory.mktemp("finished"))
    test, hidden = place / "data" / "test", place / "hidden"
    train = study.train

    def without_test_images(config: am.TrainConfig, **options: bool) -> TrainResult:
        if "/grid/" not in str(config.output):
            return train(config, **options)
        test.rename(hidden)
        try:
            return train(config, **options)
        finally:
            hidden.rename(test)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train", without_test_images)
        return place, am.finetune(settings(place), grid=[0.5, 0.01], seeds=[3, 0], quiet=True)


def test_what_a_study_gives(finished):
    place, result = finished
    assert result.folder == place / "study"
    assert list(result.grid) == [0.5, 0.01]
    assert result.learning_rate == max(result.grid, key=lambda rate: (result.grid[rate], -rate))
    assert result.measured_on == "test"
    assert list(result.accuracies) == [3, 0]
    values = list(result.accuracies.values())
    assert result.mean == pytest.approx(sum(values) / 2)
    assert result.deviation == pytest.approx(statistics.stdev(values))
    for seed, accuracy in result.accuracies.items():
        run = place / "study" / f"seed-{seed}"
        assert json.loads((run / "test" / "evaluation.json").read_text())["top1"] == accuracy
        config = json.loads((run / "config.json").read_text())
        assert config["optimizer"]["learning_rate"] == result.learning_rate
        assert config["seed"] == seed
        environment = json.loads((run / "environment.json").read_text())
        assert environment["data"]["training_images"] == sum(COUNTS.values())


def test_the_grid_never_opens_the_test_images(finished):
    """The fixture hid them; the grid's runs have the training images alone, less a tenth."""
    place, result = finished
    for rate in (0.5, 0.01):
        run = place / "study" / "grid" / f"lr-{rate}"
        config = json.loads((run / "config.json").read_text())
        assert config["data"]["source"] == f"{place / 'data'}:train"
        assert config["optimizer"]["learning_rate"] == rate
        assert not (run / "test").exists()
        found = json.loads((run / "validation" / "evaluation.json").read_text())
        assert (found["images"], found["data"]) == (3, f"{place / 'data'}:train:held-out")
        environment = json.loads((run / "environment.json").read_text())
        assert environment["data"]["training_images"] == sum(COUNTS.values()) - 3
        last = (run / "results.csv").read_text().splitlines()[-1].split(",")
        assert result.grid[rate] == float(last[3])


def test_the_folder_of_a_study(finished):
    place, result = finished
    folder = place / "study"
    there = sorted(each.name for each in folder.iterdir())
    assert there == ["best", "finetune.json", "grid", "log.txt", "seed-0", "seed-3"]
    weights = (folder / "best" / "model.safetensors").read_bytes()
    assert weights == (folder / "seed-3" / "best" / "model.safetensors").read_bytes()
    card = (folder / "best" / "README.md").read_text()
    assert "mixer predict . photo.jpg" in card
    assert str(place) not in card
    assert result.summary() in card
    values = json.loads((folder / "finetune.json").read_text())
    assert values["mean"] == result.mean
    assert values["done"]["seed-0"] == result.accuracies[0]
    found = am.predict(folder, [place / "data" / "test" / "ant" / "0.png"], num_workers=0)
    assert {name for name, _ in found[0].classes} == {"ant", "bee", "cat"}


def test_the_log_of_a_study(finished):
    place, result = finished
    lines = (place / "study" / "log.txt").read_text().splitlines()
    assert (
        lines[0]
        == "study    rates 0.5, 0.01, judged on 10% of the training images; then seeds 3, 0"
    )
    assert f"seed 3     test        {result.accuracies[3]:.2%}" in lines
    assert any(line.startswith(f"test accuracy {result.mean:.2%} +- ") for line in lines)
    assert "mean and standard deviation of seeds 3, 0" in lines[-3]


def test_the_same_again_only_reports(finished, monkeypatch, capsys):
    place, result = finished
    files = [each for each in (place / "study").rglob("*") if each.name != "log.txt"]
    before = {each: each.read_bytes() for each in files if each.is_file()}
    monkeypatch.setattr(study, "train", None)  # whoever trains fails
    again = am.finetune(settings(place), grid=[0.5, 0.01], seeds=[3, 0])
    assert again == result
    out = capsys.readouterr().out
    assert "done     grid/lr-0.5: " in out
    assert "===" not in out
    assert {each: each.read_bytes() for each in before} == before


def test_another_study_is_refused(finished):
    place, _ = finished
    before = (place / "study" / "finetune.json").read_bytes()
    for changes, grid, seeds, message in [
        ({"batch_size": 4}, [0.5, 0.01], [3, 0], "batch_size is 8 there and 4 here"),
        ({}, [0.5], [3, 0], r"the grid is \[0.5, 0.01\] there and \[0.5\] here"),
        ({}, [0.5, 0.01], [3], r"the seeds are \[3, 0\] there and \[3\] here"),
        ({}, [0.5, 0.01], [0, 3], r"the seeds are \[3, 0\] there and \[0, 3\] here"),
    ]:
        with pytest.raises(am.UserError, match=f"holds another study: {message}"):
            am.finetune(settings(place, **changes), grid=grid, seeds=seeds, quiet=True)
    with pytest.raises(am.UserError, match="exists and is not empty"):
        am.train(settings(place), quiet=True)
    assert (place / "study" / "finetune.json").read_bytes() == before


def test_seeds_can_be_added(place, monkeypatch):
    asked = pretend(monkeypatch, lambda config: 0.5 + config.seed / 10)
    first = am.finetune(settings(place), grid=[0.1], seeds=[0], quiet=True)
    assert (first.mean, first.deviation) == (0.5, None)
    assert "50.00% (seed 0)" in (place / "study" / "best" / "README.md").read_text()
    second = am.finetune(settings(place), grid=[0.1], seeds=[0, 2], quiet=True)
    assert [Path(str(each.output)).name for each in asked] == ["lr-0.1", "seed-0", "seed-2"]
    assert second.mean == pytest.approx(0.6)
    assert "seeds 0, 2" in (place / "study" / "best" / "README.md").read_text()


def test_of_equal_rates_the_lowest(place, monkeypatch):
    pretend(monkeypatch, lambda config: 0.25 if config.optimizer.learning_rate == 0.5 else 0.75)
    result = am.finetune(settings(place), grid=[0.5, 0.03, 0.01, 0.1], quiet=True)
    assert result.learning_rate == 0.01
    assert result.grid == {0.5: 0.25, 0.03: 0.75, 0.01: 0.75, 0.1: 0.75}
    assert "it is the lowest of the grid" in (place / "study" / "log.txt").read_text()


def test_the_grid_is_judged_by_the_weights_that_final_runs_keep(place, monkeypatch):
    """By the last ones where the final runs validate on none, otherwise by the best."""
    pretend(monkeypatch, lambda config: 0.25)  # of the last; the best have 0.9
    result = am.finetune(settings(place), grid=[0.1], quiet=True)
    assert result.grid == {0.1: 0.25}
    make_class_folder(place / "data" / "val", {"ant": 2, "bee": 2, "cat": 2}, start=300)
    # No test: what was measured is validation.
    (place / "data" / "test").rename(place / "hidden")
    monkeypatch.undo()
    asked = pretend(monkeypatch, lambda config: 0.25)
    train = study.train

    def untested(config, *, quiet, in_study):
        result = train(config, quiet=quiet, in_study=in_study)
        return TrainResult(result.run_folder, result.validation, None)

    monkeypatch.setattr(study, "train", untested)
    result = am.finetune(settings(place, "other"), grid=[0.1], quiet=True)
    assert result.grid == {0.1: 0.9}
    assert [each.data.holdout for each in asked] == [0.1, None]


def test_a_rate_that_diverges_is_passed_over(place):
    result = am.finetune(settings(place), grid=[1e30, 0.01], quiet=True)
    assert list(result.grid) == [1e30, 0.01]
    assert result.grid[1e30] is None
    assert result.learning_rate == 0.01
    lines = (place / "study" / "log.txt").read_text().splitlines()
    assert "rate 1e+30  held out  diverged" in lines
    assert any(line.startswith("diverged step ") for line in lines)
    with pytest.raises(am.UserError, match="the run of every rate of the grid diverged"):
        am.finetune(settings(place, "other"), grid=[1e30], quiet=True)
    config = settings(place, "third", optimizer__learning_rate=1e30)
    with pytest.raises(am.UserError, match="stopped before the weights were changed"):
        am.finetune(config, seeds=[0, 1], quiet=True)  # without a grid there is no other rate


def test_other_errors_of_a_run_are_not_divergence(place, monkeypatch):
    def refused(config, *, quiet, in_study):
        raise am.UserError("the disk is full")

    monkeypatch.setattr(study, "train", refused)
    with pytest.raises(am.UserError, match="the disk is full"):
        am.finetune(settings(place), grid=[0.1], quiet=True)


def test_data_without_test_images(place, capsys):
    (place / "data" / "test").rename(place / "hidden")
    result = am.finetune(settings(place), seeds=[1, 2])
    assert result.measured_on == "validation"
    out = capsys.readouterr().out
    assert "the data has no test images: the final runs keep validation images," in out
    assert "and are measured on them, by which the weights are chosen too" in out
    assert "on the training images less those held out" in out
    assert "29 images to train, 3 to validate (held out of the training images)" in out
    assert f"validation accuracy {result.summary()}, learning rate 0.01" in out


def test_what_the_runs_hold_out(place, monkeypatch):
    """With a grid the final runs train on all training images; seeds alone repeat a run as is."""
    asked = pretend(monkeypatch, lambda config: 0.5)
    am.finetune(settings(place, data__holdout=0.2), grid=[0.1], quiet=True)
    am.finetune(settings(place, "b", data__holdout=0.2), seeds=[5, 6], quiet=True)
    am.finetune(settings(place, "c", data__holdout=0.0), seeds=[5, 6], quiet=True)
    am.finetune(settings(place, "d", recipe="finetune_cifar"), grid=[0.1], quiet=True)
    assert [each.data.holdout for each in asked] == [0.2, 0.0, 0.2, 0.2, 0.0, 0.0, 0.02, 0.0]
    make_class_folder(place / "data" / "val", {"ant": 2, "bee": 2, "cat": 2}, start=300)
    asked.clear()
    am.finetune(settings(place, "e", patience=2), grid=[0.1], quiet=True)
    assert [each.data.holdout for each in asked] == [0.1, None]  # the final run: val/, and test/
    assert [each.data.source.rpartition(":")[2] == "train" for each in asked] == [True, False]
    asked.clear()
    am.finetune(settings(place, "f", data__source=f"{place / 'data'}:train"), grid=[0.1])
    assert [each.data.source for each in asked] == [f"{place / 'data'}:train"] * 2


def test_a_study_needs_a_name(place, monkeypatch):
    monkeypatch.chdir(place)
    config = settings(place).with_value("output", None)
    with pytest.raises(am.UserError, match="a study of several runs needs a folder with a name"):
        am.finetune(config, grid=[0.1], quiet=True)
    assert sorted(each.name for each in place.iterdir()) == ["data", "weights"]


def test_nothing_is_left_to_measure_by(place):
    (place / "data" / "test").rename(place / "hidden")
    with pytest.raises(am.UserError, match="holdout 0 leaves no images to measure the accuracy"):
        am.finetune(settings(place, data__holdout=0.0), seeds=[0, 1], quiet=True)
    assert not (place / "study").exists()


def test_a_bad_image_is_told_of_by_its_run(place):
    draw(1).save(place / "data" / "train" / "ant" / "new.png")
    (place / "data" / "train" / "ant" / "new.png").write_bytes(b"not an image")
    result = am.finetune(settings(place, data__max_bad=0.1), grid=[0.1], quiet=True)
    assert (result.folder / "seed-0" / "bad_files.txt").exists()


def test_a_grid_with_images_of_its_own(place, monkeypatch, capsys):
    """Where a benchmark says which images the rate is chosen by."""
    make_class_folder(place / "grid" / "train", COUNTS, start=400)
    make_class_folder(place / "grid" / "val", {"ant": 2, "bee": 2, "cat": 2}, start=500)
    asked = pretend(monkeypatch, lambda config: 0.5)
    source = str(place / "grid")
    am.finetune(settings(place), grid=[0.1, 0.2], grid_source=source)
    assert [each.data.source for each in asked] == [source, source, str(place / "data")]
    assert [each.data.holdout for each in asked] == [None, None, 0.0]
    assert "judged on the images that are set apart for it" in capsys.readouterr().out
    with pytest.raises(am.UserError, match=r"grid_source is '.*/grid' there and None here"):
        am.finetune(settings(place), grid=[0.1, 0.2], quiet=True)
    for options, changes, message in [
        ({"grid_source": source}, {}, "has no effect without a grid"),
        ({"grid_source": source, "grid": [0.1]}, {"data__holdout": 0.1}, "beside grid_source"),
        ({"grid_source": str(place / "data"), "grid": [0.1]}, {}, "and has test, train"),
    ]:
        with pytest.raises(am.UserError, match=message):
            am.finetune(settings(place, "other", **changes), quiet=True, **options)
    assert not (place / "other").exists()
