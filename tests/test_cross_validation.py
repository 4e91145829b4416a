"""Cross-validation: every image is predicted once, by a model that has not seen it; resume."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import allmlp as am
from allmlp.evaluation import metrics
from conftest import best_of, make_class_folder, ran, refused, tiny_config
from studies import note_runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[am.TrainConfig, am.CrossValidation]:
    folder = tmp_path_factory.mktemp("folds")
    data = make_class_folder(folder / "data" / "train", {"ant": 7, "bee": 9, "cat": 5}).parent
    make_class_folder(data / "test", {"ant": 2, "bee": 2, "cat": 2}, start=100)
    config = tiny_config(str(data), folder / "study", optimizer__learning_rate=0.01)
    return config, am.cross_validate(config, 3, quiet=True)


def test_every_image_is_predicted_once_by_a_model_that_has_not_seen_it(finished):
    _, result = finished
    found = result.out_of_fold
    assert found.indices.tolist() == [*range(21)]
    assert np.bincount(found.labels).tolist() == [7, 9, 5]
    with (result.folder / "out_of_fold" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["image"] for row in rows}) == 21
    right = 0
    for fold in (1, 2, 3):
        own = [row for row in rows if row["fold"] == str(fold)]
        model = am.load_model(result.folder / f"fold-{fold}")
        answers = am.predict(model, [row["image"] for row in own], device="cpu", num_workers=0)
        assert [answer.classes[0][0] for answer in answers] == [row["predicted"] for row in own]
        own_right = sum(row["class"] == row["predicted"] for row in own)
        assert result.folds[fold - 1]["top1"] == pytest.approx(own_right / len(own))
        right += own_right
        environment = json.loads((result.folder / f"fold-{fold}" / "environment.json").read_text())
        assert environment["data"]["training_images"] == 21 - len(own)
    assert found.top1 == pytest.approx(right / 21)


def test_what_is_reported(finished):
    _, result = finished
    top1 = [fold["top1"] for fold in result.folds]
    assert result.spread("top1") == pytest.approx((np.mean(top1), np.std(top1, ddof=1)))
    values = json.loads((result.folder / "folds.json").read_text())
    assert values["held_out"]["top1"]["mean"] == pytest.approx(np.mean(top1))
    assert values["test"]["top1"]["mean"] == pytest.approx(
        np.mean([t["top1"] for t in result.tests])
    )
    assert values["out_of_fold"]["top1"] == result.out_of_fold.top1
    assert top1[result.best - 1] == max(top1)
    assert best_of(result.folder) == best_of(result.folder / f"fold-{result.best}")
    assert f"fold {result.best} of 3" in (result.folder / "best" / "README.md").read_text()


def test_a_study_resumes(finished, monkeypatch: pytest.MonkeyPatch):
    config, result = finished
    asked = note_runs(monkeypatch)
    again = am.cross_validate(config, 3, quiet=True)
    assert asked == []
    assert (again.out_of_fold.logits == result.out_of_fold.logits).all()
    (result.folder / "fold-2" / "out_of_fold.npz").unlink()  # measured again
    again = am.cross_validate(config, 3, quiet=True)
    assert asked == ["study/fold-2"]
    assert again.out_of_fold.logits == pytest.approx(result.out_of_fold.logits, abs=1e-6)
    table = (result.folder / "out_of_fold" / "predictions.csv").read_text()
    (result.folder / "fold-2" / "out_of_fold.npz").unlink()
    monkeypatch.setattr(metrics, "LARGEST_LOGITS", 0)  # of this fold they are not kept
    again = am.cross_validate(config, 3, quiet=True).out_of_fold
    assert again.logits.size == 0
    assert dict(again.figures()) == pytest.approx(dict(result.out_of_fold.figures()))
    assert (result.folder / "out_of_fold" / "predictions.csv").read_text() == table


def test_the_command_and_its_mistakes(finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, result = finished
    source = config.data.source
    out, _ = ran(capsys, "evaluate", result.folder, "--data", f"{source}:train", "--device", "cpu")
    assert "14 of 21 images were trained on" in out
    for wrong, named in (
        (["--folds", "1"], "1 folds"),
        (["--folds", "22"], "21 images"),
        (["--folds", "3", "--holdout", "0.1"], "holdout"),
        (["--folds", "3", "--set", "patience=2"], "patience"),
        (["--folds", "3", "--resume", result.folder / "fold-1"], "folds"),
    ):
        given = ["--data", source, "--output", tmp_path / "new"]
        line = ("train", *(given if "--resume" not in wrong else []), *wrong)
        assert named in refused(capsys, tmp_path, *line)
    line = ("finetune", result.folder, "--data", source, "--grid", "--folds", "3")
    assert "grid" in refused(capsys, tmp_path, *line, "--output", tmp_path / "new")
