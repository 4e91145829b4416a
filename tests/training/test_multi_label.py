"""Multi-label data: metrics against scikit-learn, training, prediction, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, log_loss

import allmlp as am
from allmlp.decision import Decision
from allmlp.evaluation.metrics import Evaluation, average_precision
from allmlp.training.run_folder import config_of
from conftest import TINY, mixer, tiny_model, tiny_run, user_error


def make_set(folder: Path, number: int = 120, seed: int = 0) -> Path:
    """Images whose labels are the channels that are bright; some have none."""
    random = np.random.default_rng(seed)
    lines = ["path,label"]
    for at in range(number):
        hot = random.random(3) < (0.5, 0.3, 0.5)
        pixels = random.integers(0, 90, (8, 8, 3)) + hot * 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{at}.png")
        lines.append(f"{at}.png,{'|'.join(np.array(['red', 'green', 'blue'])[hot])}")
    path = folder / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    assert any(line.count("|") for line in lines)
    return path


def of(labels: np.ndarray, logits: np.ndarray, **decision: object) -> Evaluation:
    names = [f"c{number}" for number in range(labels.shape[1])]
    how = Decision(labels="multi", **decision)
    return Evaluation("x", names, labels, np.arange(len(labels)), logits, decision=how)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_scikit_learns(seed: int):
    random = np.random.default_rng(seed)
    labels = random.random((50, 6)) < (0.02, 0.2, 0.5, 0.5, 0.8, 0.3)
    labels[:, 5] = False  # a class without images
    logits = random.normal(size=(50, 6)).round(seed % 2 + 1).astype(np.float32)  # with ties
    thresholds = tuple(random.uniform(0.3, 0.7, 6).tolist())
    found = of(labels, logits, thresholds=thresholds)
    with_images = labels.any(axis=0)
    expected = average_precision_score(labels[:, with_images], logits[:, with_images])
    assert found.mean_average_precision == pytest.approx(expected, abs=1e-12)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    answers = probabilities >= thresholds
    assert np.array_equal(found.predictions, answers)
    assert found.micro_f1 == pytest.approx(f1_score(labels, answers, average="micro"), abs=1e-12)
    either = labels.any(axis=0) | answers.any(axis=0)
    macro = f1_score(labels[:, either], answers[:, either], average="macro")
    assert found.macro_f1 == pytest.approx(macro, abs=1e-12)
    columns = zip(labels.T, probabilities.T, strict=True)
    losses = [log_loss(truth, values, labels=[0, 1]) for truth, values in columns]
    assert found.loss == pytest.approx(sum(losses), rel=1e-6)
    names = dict(found.figures())
    assert names["exact_match"] == (labels == answers).all(axis=1).mean()
    assert not {"top1", "top5", "balanced_accuracy"} & names.keys()
    assert found.top5 is None  # which the last lines of a training ask for
    assert average_precision(labels[:, 5], logits[:, 5]) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("multi")
    data = make_set(folder)
    changes = {"data__holdout": 0.3, "model__overrides": {**TINY, "num_blocks": 1}}
    changes |= {"augment__crop": "none", "optimizer__learning_rate": 0.02, "epochs": 20}
    tiny_run(data, folder / "run", batch_size=16, evaluate_every=5, **changes)
    return folder / "run", data


def test_training_learns_every_label(run: tuple[Path, Path], capsys):
    folder, data = run
    config = config_of(folder)
    assert (config.loss.name, config.best_by) == ("sigmoid", "mean_average_precision")
    result = am.evaluate(str(folder), str(data))
    assert result.labels.shape[1] == 3
    expected = average_precision_score(result.labels, result.logits)
    assert dict(result.figures())["mean_average_precision"] == pytest.approx(expected, abs=1e-9)
    assert expected > 0.95
    _, out, _ = mixer(capsys, "evaluate", folder, "--data", data)
    (header,) = (line.split() for line in out.splitlines() if line.startswith("class "))
    assert header[3:] == ["recall", "precision", "f1", "average_precision", "threshold"]
    values = json.loads(mixer(capsys, "evaluate", folder, "--data", data, "--json")[1])
    assert values["model"]["source"] == str(folder)
    assert values["environment"]["python"]
    decision = am.load_model(folder, quiet=True).decision
    assert decision.thresholds is not None
    assert {"images", "f1_after"} <= decision.measured["thresholds"].keys()
    assert not (folder / "validation" / "confusion.csv").exists()
    saved = json.loads((folder / "validation" / "evaluation.json").read_text())
    assert saved["per_class"][0].keys() >= {"average_precision", "threshold", "f1"}
    assert "mAP" in (folder / "best" / "README.md").read_text()
    assert am.train(config, quiet=True).run_folder == folder  # the same call resumes


def test_probe_folds_and_weights(run: tuple[Path, Path], tmp_path: Path):
    settings = {"output": str(tmp_path / "probe"), "model.train_only": "probe"}
    config = am.finetune_config(str(run[0]), f"{run[1]}", settings)
    probe = am.train(config.with_value("data.holdout", 0.3), quiet=True)
    assert (probe.validation.mean_average_precision or 0) > 0.99
    assert probe.validation.decision.labels == "multi"
    own = {"epochs": 6, "best_by": "top1", "output": str(tmp_path / "folds"), "data.holdout": None}
    found = am.cross_validate(config_of(run[0]).with_values(own), 2, quiet=True)
    assert found.main == "mean_average_precision"
    everything = found.out_of_fold
    assert everything.mean_average_precision == pytest.approx(
        average_precision_score(everything.labels, everything.logits), abs=1e-9
    )
    assert len(everything.labels) == 120
    with open(found.folder / "out_of_fold" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert any("|" in row["class"] for row in rows)
    weights = {"output": str(tmp_path / "weights"), "data.balance": "weights", "epochs": 6}
    rare: list[float] = []  # the mean probability of the rarest label
    for one in ({}, {"data.balance": "none", "output": str(tmp_path / "none")}):
        config = config_of(run[0]).with_values({**weights, **one})
        result = am.train(config, quiet=True).validation
        rare.append(result.probabilities[:, result.labels.sum(axis=0).argmin()].mean())
    assert rare[0] > rare[1] + 0.02


def test_a_study_chooses_by_mean_average_precision(run: tuple[Path, Path], tmp_path: Path):
    changes = {"model.weights": str(run[0]), "data.source": str(run[1]), "epochs": 2}
    changes |= {"optimizer.warmup": 0.1, "batch_size": 32, "augment.crop": "none"}
    config = am.recipe("finetune").with_values({**changes, "output": str(tmp_path / "study")})
    result = am.finetune(config, grid=[0.01, 0.001], quiet=True)
    assert result.best_by == "mean_average_precision"
    assert result.grid[result.learning_rate] == max(filter(None, result.grid.values()))
    assert result.mean == pytest.approx(np.mean(list(result.accuracies.values())))
    assert result.mean > 0.9


def test_predictions_are_the_classes_that_reach_their_threshold(run, tmp_path, capsys):
    folder, data = run
    result = am.evaluate(str(folder), f"{data}:train[:20]")
    rows = am.predict(folder, f"{data}:train[:20]")
    for row, answers in zip(rows, result.predictions, strict=True):
        assert row.answers == [result.class_names[at] for at in np.flatnonzero(answers)]
    assert mixer(capsys, "predict", folder, data, "--output", tmp_path / "p.csv")[0] == 0
    with open(tmp_path / "p.csv") as file:
        answers = [line["answer"] for line in csv.DictReader(file)]
    assert len(set(answers)) > 3
    assert "" in answers  # an image without a label


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"loss": "softmax", "loss.label_smoothing": 0.2}, "multi-label"),
        ({"best_by": "top1", "data.balance": "sampler"}, "multi-label"),
        ({"best_by": "balanced_accuracy"}, "not-applicable"),
    ],
)
def test_what_cannot_be_is_said(run: tuple[Path, Path], tmp_path: Path, changes, code: str):
    config = config_of(run[0]).with_values({"output": str(tmp_path / "x"), **changes})
    with user_error(code):
        am.train(config, quiet=True)
    assert not (tmp_path / "x").exists()


def relabelled(run: tuple[Path, Path], folder: Path, lines: list[str]) -> am.TrainConfig:
    """An epoch on the run's images with another list."""
    source = run[1].with_name(f"{folder.name}.csv")
    source.write_text("\n".join(lines) + "\n")
    changes = {"data.source": str(source), "epochs": 1, "output": str(folder / "run")}
    return config_of(run[0]).with_values(changes)


def test_validation_images_without_a_label(run: tuple[Path, Path], tmp_path: Path):
    """They have no average precision, and the other metrics have a value."""
    labels = ["red|blue", "green", *[""] * 18]  # too few to be held out
    lines = [f"{at}.png,{label}" for at, label in enumerate(labels)]
    config = relabelled(run, tmp_path, ["path,label", *lines])
    with user_error("not-applicable") as error:
        am.train(config, quiet=True)
    assert "micro_f1" in str(error.value.fix)
    found = am.train(config.with_value("best_by", "micro_f1"), quiet=True).validation
    assert found.mean_average_precision is None


def test_a_fold_without_a_label(run: tuple[Path, Path], tmp_path: Path):
    """It has no average precision, so the folds are compared by micro F1."""
    labels = ["red|blue", "green", ""]
    lines = [f"{at}.png,{labels[at % 3]},{at % 3}" for at in range(24)]
    config = relabelled(run, tmp_path, ["path,label,fold", *lines])
    config = config.with_values({"data.holdout": None, "best_by": "top1"})
    found = am.cross_validate(config, 3, quiet=True)
    assert found.main == "micro_f1"
    assert ["mean_average_precision" in fold for fold in found.folds] == [True, True, False]
    assert found.out_of_fold.mean_average_precision is not None
    best = max(found.folds, key=lambda fold: fold["micro_f1"])
    assert found.folds[found.best - 1]["micro_f1"] == best["micro_f1"]


def test_a_model_of_one_label_refuses_several(run: tuple[Path, Path]):
    model = am.load_model(run[0], quiet=True)
    model.decision = Decision()
    with user_error("multi-label"):
        am.evaluate(model, str(run[1]))


def test_wrong_labels_come_first(tmp_path: Path):
    data = make_set(tmp_path)
    lines = data.read_text().splitlines()
    wrong = range(5, 100, 20)
    for at in wrong:  # "red" is added or removed
        path, _, labels = lines[at].partition(",")
        lines[at] = path + "," + "|".join(set(filter(None, labels.split("|"))) ^ {"red"})
    data.write_text("\n".join(lines) + "\n")
    model = tiny_model(num_classes=3)
    found = am.find_label_mistakes(model, data, num_workers=0, device="cpu")
    first = {Path(image.name).stem: image for image in found.ranked[:6]}
    assert first.keys() >= {str(at - 1) for at in wrong}
    for at in wrong:
        image = first[str(at - 1)]
        assert set(image.label.split("|")) ^ set(image.suggestion.split("|")) - {""} >= {"red"}
    assert sum(first[str(at - 1)].suspected for at in wrong) >= 3
    assert len(found.suspected) <= 5
