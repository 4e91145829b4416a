"""Figures against scikit-learn's, and that every image counts once."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

import mlp_mixer as mm
from conftest import tiny_model
from mlp_mixer.data.sources import open_splits


@pytest.fixture(scope="module")
def result() -> mm.Evaluation:
    random = np.random.default_rng(0)
    labels = random.integers(0, 7, size=200)
    labels[labels == 5] = 4  # a class without images
    logits = random.normal(size=(200, 7)) + 1.5 * np.eye(7)[labels]
    exponentials = np.exp(logits)
    probabilities = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
    names = [f"class {number}" for number in range(7)]
    return mm.Evaluation("drawn", names, labels, np.arange(200), probabilities)


def test_against_scikit_learn(result: mm.Evaluation):
    truth, guess, classes = result.labels, result.predictions, np.arange(7)
    assert result.top1 == pytest.approx(metrics.accuracy_score(truth, guess))
    five = metrics.top_k_accuracy_score(truth, result.probabilities, k=5, labels=classes)
    assert result.top5 == pytest.approx(five)
    exact = result.probabilities.astype(float)
    exact /= exact.sum(axis=1, keepdims=True)
    loss = metrics.log_loss(truth, exact, labels=classes)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert (result.confusion == metrics.confusion_matrix(truth, guess, labels=classes)).all()
    recall = metrics.recall_score(truth, guess, labels=classes, average=None, zero_division=0)
    precision = metrics.precision_score(truth, guess, labels=classes, average=None, zero_division=0)
    for row, r, p in zip(result.per_class(), recall, precision, strict=True):
        assert row["recall"] == (pytest.approx(r) if row["images"] else None)
        assert (row["precision"] or 0.0) == pytest.approx(p)


def test_worst_confusions(result: mm.Evaluation):
    confusions = result.worst_confusions(4)
    counts = [count for _, _, count in confusions]
    assert counts == sorted(counts, reverse=True)
    for true, predicted, count in confusions:
        row, column = result.class_names.index(true), result.class_names.index(predicted)
        assert row != column
        assert result.confusion[row, column] == count
    assert result.confusion.trace() > 0  # not changed by it


def test_a_certain_mistake_has_a_finite_loss():
    sure = mm.Evaluation("x", ["a", "b"], np.array([0]), np.array([0]), np.float32([[0.0, 1.0]]))
    assert math.isfinite(sure.loss)
    assert sure.loss > 80
    assert sure.top5 is None


def test_files(result: mm.Evaluation, tmp_path: Path):
    result.save(tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert figures["top1"] == result.top1
    assert figures["images"] == 200
    assert np.array(figures["confusion"]).sum() == 200
    with (tmp_path / "out" / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == result.class_names
    assert sum(int(row["correct"]) for row in rows) == result.confusion.trace()
    with (tmp_path / "out" / "confusion.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["true class", *result.class_names]
    assert [[int(cell) for cell in row[1:]] for row in table[1:]] == result.confusion.tolist()


def model_for(class_names: list[str]) -> mm.ImageClassifier:
    model = tiny_model(num_classes=len(class_names))
    model.class_names = class_names
    return model


def test_every_image_counts_once_whatever_the_batch(class_folder: Path):
    model = model_for(["ant", "bee", "cat"])
    results = [
        mm.evaluate(model, f"{class_folder}:train", batch_size=size, num_workers=0, device="cpu")
        for size in (1, 7, 64)
    ]
    for each in results:
        assert each.indices.tolist() == list(range(20))
        assert each.labels.tolist() == open_splits(str(class_folder))["train"].labels.tolist()
        np.testing.assert_allclose(each.probabilities, results[0].probabilities, atol=1e-6)


def test_the_order_of_classes_does_not_matter(class_folder: Path):
    model = model_for(["ant", "bee", "cat"])
    turned = model_for(["cat", "ant", "bee"])
    turned.load_state_dict(model.state_dict())
    order = [2, 0, 1]
    turned.head.weight.data = model.head.weight.data[order].clone()
    turned.head.bias.data = model.head.bias.data[order].clone()
    options = {"num_workers": 0, "device": "cpu"}
    first = mm.evaluate(model, str(class_folder), **options)
    second = mm.evaluate(turned, str(class_folder), **options)
    assert first.top1 == second.top1
    named = [[e.class_names[i] for i in e.predictions] for e in (first, second)]
    assert named[0] == named[1]


def test_the_models_mode_is_kept(class_folder: Path):
    model = model_for(["ant", "bee", "cat"]).train()
    mm.evaluate(model, str(class_folder), num_workers=0, device="cpu")
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_images_are_left_out_and_named(class_folder: Path):
    (class_folder / "val" / "bee" / "1.png").write_bytes(b"x")
    result = mm.evaluate(model_for(["ant", "bee", "cat"]), str(class_folder), num_workers=0)
    assert len(result.labels) == 8
    assert [Path(each.name).name for each in result.bad] == ["1.png"]
    assert result.to_json()["bad_images"][0]["error"] == "the file is not an image"


def test_nothing_but_bad_images(class_folder: Path):
    for path in (class_folder / "val").rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(mm.UserError, match="none of the images can be decoded"):
        mm.evaluate(model_for(["ant", "bee", "cat"]), str(class_folder), num_workers=0)


def test_other_classes_are_refused(class_folder: Path):
    with pytest.raises(
        mm.UserError, match="unknown to the model: 'cat'; missing in the data: 'dog'"
    ):
        mm.evaluate(model_for(["ant", "bee", "dog"]), str(class_folder), num_workers=0)
    four = model_for(["ant", "bee", "cat", "dog"])
    with pytest.raises(mm.UserError, match="--allow-missing-classes"):
        mm.evaluate(four, str(class_folder), num_workers=0)
    allowed = mm.evaluate(four, str(class_folder), num_workers=0, allow_missing_classes=True)
    assert allowed.confusion.shape == (4, 4)
