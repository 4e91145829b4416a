"""Fine-tuning studies: the grid and its held-out images, the seeds, and how a study resumes."""

import json
import statistics
from pathlib import Path

import pytest

import allmlp as am
from allmlp import sweep
from allmlp.training.report import TrainResult
from conftest import best_of, make_class_folder
from studies import COUNTS, make_place, pretend, settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, am.FinetuneResult]:
    """A study of two rates and two seeds; while its grid runs there are no test images at all."""
    place = make_place(tmp_path_factory.mktemp("finished"))
    test, hidden = place / "data" / "test", place / "hidden"
    train = sweep.train

    def without_test_images(config: am.TrainConfig, **options: bool) -> TrainResult:
        if "/grid/" not in str(config.output):
            return train(config, **options)
        test.rename(hidden)
        try:
            return train(config, **options)
        finally:
            hidden.rename(test)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "train", without_test_images)
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
    assert best_of(folder) == best_of(folder / "seed-3")
    card = (folder / "best" / "README.md").read_text()
    assert "mixer predict . photo.jpg" in card
    assert str(place) not in card
    assert result.summary() in card
    values = json.loads((folder / "finetune.json").read_text())
    assert (values["mean"], values["run"]) == (result.mean, "seed-3")
    assert values["accuracies"] == list(result.accuracies.values())
    assert result.summary() in (folder / "log.txt").read_text()
    found = am.predict(folder, [place / "data" / "test" / "ant" / "0.png"], num_workers=0)
    assert {name for name, _ in found[0].classes} == {"ant", "bee", "cat"}


def test_the_same_again_only_reports(finished, monkeypatch):
    place, result = finished
    files = [path for path in (place / "study").rglob("*") if path.name != "log.txt"]
    before = {path: path.read_bytes() for path in files if path.is_file()}
    monkeypatch.setattr(sweep, "train", None)  # whoever trains fails
    assert am.finetune(settings(place), grid=[0.5, 0.01], seeds=[3, 0], quiet=True) == result
    assert {path: path.read_bytes() for path in before} == before


def test_seeds_and_rates_can_be_added(place, monkeypatch):
    asked = pretend(monkeypatch, lambda config: 0.5 + config.seed / 10)
    first = am.finetune(settings(place), grid=[0.1], seeds=[0], quiet=True)
    assert (first.mean, first.deviation) == (0.5, None)
    assert first.summary() in (place / "study" / "best" / "README.md").read_text()
    second = am.finetune(settings(place), grid=[0.2, 0.1], seeds=[0, 2], quiet=True)
    assert [Path(str(config.output)).name for config in asked] == [
        *("lr-0.1", "seed-0", "lr-0.2", "seed-2")
    ]
    assert second.mean == pytest.approx(0.6)
    assert "seeds 0, 2" in (place / "study" / "best" / "README.md").read_text()


def test_the_rate_is_chosen_by_a_metric(place, monkeypatch):
    """Of the last validation, a lower loss is better; the final run has no images to choose by."""
    asked = pretend(monkeypatch, lambda config: config.optimizer.learning_rate)
    pretended = sweep.train

    def train(config: am.TrainConfig, **options: bool) -> TrainResult:
        result = pretended(config, **options)
        path, loss = result.run_folder / "results.csv", abs(config.optimizer.learning_rate - 0.1)
        path.write_text(f"step,seconds,validation_top1,validation_loss\n6,3.5,0.5,{loss}\n")
        return result

    monkeypatch.setattr(sweep, "train", train)
    result = am.finetune(settings(place, best_by="loss"), grid=[0.5, 0.1, 0.3], quiet=True)
    assert (result.learning_rate, result.grid[0.5]) == (0.1, 0.4)
    assert [config.best_by for config in asked] == ["loss", "loss", "loss", "top1"]
    written = json.loads((place / "study" / "finetune.json").read_text())
    assert (written["best_by"], written["grid"][0]) == ("loss", [0.5, 0.4])
    assert written["metrics"]["macro_f1"]["mean"] == 0.025


def test_the_grid_is_judged_by_the_weights_that_final_runs_keep(place, monkeypatch):
    """By the last ones where the final runs validate on none, otherwise by the best."""
    asked = pretend(monkeypatch, lambda config: 0.25)  # of the last; the best have 0.9
    result = am.finetune(settings(place), grid=[0.1], quiet=True)
    assert result.grid == {0.1: 0.25}
    make_class_folder(place / "data" / "val", {"ant": 2, "bee": 2, "cat": 2}, start=300)
    result = am.finetune(settings(place, "other"), grid=[0.1], quiet=True)
    assert result.grid == {0.1: 0.9}
    assert [config.data.holdout for config in asked] == [0.1, 0.0, 0.1, None]


def test_a_rate_that_diverges_is_passed_over(place):
    result = am.finetune(settings(place), grid=[1e30, 0.01], quiet=True)
    assert list(result.grid) == [1e30, 0.01]
    assert result.grid[1e30] is None
    assert result.learning_rate == 0.01
    with pytest.raises(am.UserError, match="every rate"):
        am.finetune(settings(place, "other"), grid=[1e30], quiet=True)
    config = settings(place, "third", optimizer__learning_rate=1e30)
    with pytest.raises(am.UserError, match="stopped before the weights were changed"):
        am.finetune(config, seeds=[0, 1], quiet=True)  # without a grid there is no other rate


def test_data_without_test_images(place):
    (place / "data" / "test").rename(place / "hidden")
    result = am.finetune(settings(place), seeds=[1, 2], quiet=True)
    assert result.measured_on == "validation"
    with pytest.raises(am.UserError, match="holdout 0"):
        am.finetune(settings(place, "other", data__holdout=0.0), seeds=[0, 1], quiet=True)
    assert not (place / "other").exists()


def test_what_the_runs_hold_out(place, monkeypatch):
    """With a grid the final runs train on all training images; seeds alone repeat a run as is."""
    asked = pretend(monkeypatch, lambda config: 0.5)
    am.finetune(settings(place, data__holdout=0.2), grid=[0.1], quiet=True)
    am.finetune(settings(place, "b", data__holdout=0.2), seeds=[5, 6], quiet=True)
    am.finetune(settings(place, "c", data__holdout=0.0), seeds=[5, 6], quiet=True)
    am.finetune(settings(place, "d", recipe="finetune_cifar"), grid=[0.1], quiet=True)
    assert [config.data.holdout for config in asked] == [0.2, 0.0, 0.2, 0.2, 0.0, 0.0, 0.02, 0.0]
    make_class_folder(place / "data" / "val", {"ant": 2, "bee": 2, "cat": 2}, start=300)
    asked.clear()
    am.finetune(settings(place, "e", patience=2), grid=[0.1], quiet=True)
    assert [config.data.holdout for config in asked] == [0.1, None]  # finally: val/, and test/
    assert [config.data.source.endswith(":train") for config in asked] == [True, False]
    asked.clear()
    am.finetune(settings(place, "f", data__source=f"{place / 'data'}:train"), grid=[0.1])
    assert [config.data.source for config in asked] == [f"{place / 'data'}:train"] * 2
