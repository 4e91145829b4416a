"""Metrics against scikit-learn's and a plain loop, and that every image counts once."""

import contextlib
import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics

import allmlp as am
from allmlp.data.source import Source
from allmlp.data.sources import open_source
from allmlp.decision import Decision
from allmlp.evaluation.calibration import fitted
from allmlp.evaluation.metrics import evaluate_source, metric_of, reliability
from allmlp.evaluation.predictor import Predictor
from allmlp.evaluation.result_file import read_measurement
from allmlp.runtime.world import World
from conftest import tiny_model, user_error

pytestmark = pytest.mark.numerics


def from_logits(logits: np.ndarray, labels: np.ndarray) -> am.Evaluation:
    names = [f"class {number}" for number in range(logits.shape[1])]
    return am.Evaluation("drawn", names, labels, np.arange(len(labels)), np.float32(logits))


def test_against_scikit_learn():
    random, classes = np.random.default_rng(0), np.arange(7)
    truth = random.integers(0, 7, size=3000)
    truth[truth == 5] = 4  # a class without images
    result = from_logits(random.normal(size=(3000, 7)) + 1.5 * np.eye(7)[truth], truth)
    guess = result.predictions
    assert result.top1 == pytest.approx(metrics.accuracy_score(truth, guess))
    assert result.top5 == metrics.top_k_accuracy_score(truth, result.logits, k=5, labels=classes)
    exact = np.exp(result.logits.astype(float))
    exact /= exact.sum(axis=1, keepdims=True)
    loss = metrics.log_loss(truth, exact, labels=classes)
    assert result.loss == pytest.approx(loss, rel=1e-9)
    np.testing.assert_allclose(result.probabilities, exact, rtol=1e-5)
    assert (result.confusion == metrics.confusion_matrix(truth, guess, labels=classes)).all()
    recall = metrics.recall_score(truth, guess, labels=classes, average=None, zero_division=0)
    precision = metrics.precision_score(truth, guess, labels=classes, average=None, zero_division=0)
    for row, r, p in zip(result.per_class(), recall, precision, strict=True):
        assert row["recall"] == (pytest.approx(r) if row["images"] else None)
        assert (row["precision"] or 0.0) == pytest.approx(p)
    worst = result.confusion - np.diag(result.confusion.diagonal())
    found = [count for _, _, count in result.worst_confusions(4)]
    assert found == sorted(worst.ravel(), reverse=True)[:4]
    f1 = metrics.f1_score(truth, guess, labels=classes, average=None)
    assert [row["f1"] for row in result.per_class()] == pytest.approx(f1)
    assert dict(result.figures()) == {
        "top1": result.top1,
        "balanced_accuracy": result.balanced_accuracy,
        "macro_f1": result.macro_f1,
        "top5": result.top5,
        "loss": result.loss,
        "expected_calibration_error": result.expected_calibration_error,
    }


@pytest.mark.parametrize(
    ("truth", "guess"),
    [
        ([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]),
        ([0, 0, 0, 1, 1, 3], [0, 0, 0, 1, 1, 1]),  # 3 is never predicted, 2 nowhere
        ([0, 0, 0, 0, 1, 1], [0, 0, 2, 2, 1, 0]),  # 2 is predicted, and has no image
        ([1, 1], [1, 1]),
        ([1, 1], [0, 2]),
    ],
)
def test_balanced_accuracy_and_f1_against_scikit_learn(truth: list[int], guess: list[int]):
    found = from_logits(np.eye(4)[guess], np.array(truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "y_pred contains classes not in y_true"
        accuracy = metrics.balanced_accuracy_score(truth, guess)
        f1 = metrics.f1_score(truth, guess, average="macro")
    assert (found.balanced_accuracy, found.macro_f1) == pytest.approx((accuracy, f1), abs=1e-15)


@pytest.mark.parametrize(("right", "of"), [(0, 1), (1, 1), (19, 20), (190, 200), (500, 1000)])
def test_the_interval_of_top1(right: int, of: int):
    found = from_logits(np.eye(2)[[0] * right + [1] * (of - right)], np.zeros(of, np.int64))
    exact = binomtest(right, of).proportion_ci(method="wilson")
    assert found.top1_interval == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert found.to_json()["top1_interval"] == list(found.top1_interval)
    line = next(found.lines())
    assert ("95% interval" in line) == (of < 1000)


def test_metrics_that_do_not_apply():
    three = from_logits(np.eye(3), np.arange(3))
    assert metric_of("macro_f1", three).name == "macro_f1"
    with user_error("not-applicable") as wrong:
        metric_of("top5", three)
    assert "balanced_accuracy" in str(wrong.value.fix)
    assert "top5" not in str(wrong.value.fix)
    with user_error("unknown-name"):
        metric_of("top-1")


def test_classes_that_are_never_predicted_are_named():
    """Of those that the data has: not class 3, which has no image."""
    logits = np.array([[9, 1, 0, 0], [2, 8, 0, 0], [6, 4, 0, 0], [1, 0, 0, 0]])
    found = from_logits(logits, np.array([0, 0, 1, 2]))
    assert found.warnings() == ["never predicted: class 2"]
    found.logits[3] = [0, 0, 1, 0]
    assert found.warnings() == []


def test_the_loss_is_not_clipped():
    logits = np.array([[0.0, 200.0], [200.0, 0.0], [0.0, 1e4]])
    gap = from_logits(logits, np.zeros(3, np.int64))
    assert gap.losses.tolist() == [200.0, 0.0, 10_000.0]
    assert gap.loss == 3400.0
    assert gap.top1 == pytest.approx(1 / 3)
    assert gap.top5 is None


def test_files(class_folder: Path, tmp_path: Path):
    model = tiny_model(["ant", "bee", "cat"])
    model.source = "runs/mine"
    result = am.evaluate(model, str(class_folder), num_workers=0)
    result.save(tmp_path / "out", model)
    values = read_measurement(tmp_path / "out" / "evaluation.json")
    assert (values["kind"], values["model"]["source"]) == ("evaluation", "runs/mine")
    assert result.to_json()["model"]["source"] == "runs/mine"
    assert "packages" in result.to_json()["environment"]
    assert values["protocol"]["image_size"] == [8, 8]
    assert (values["images"], values["images_in_data"]) == (9, 9)
    assert values["top1"] == result.top1
    assert sum(row["images"] for row in values["reliability"]) == 9
    rows = list(csv.DictReader((tmp_path / "out" / "per_class.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == result.class_names
    assert sum(int(row["correct"]) for row in rows) == result.confusion.trace()
    table = list(csv.reader((tmp_path / "out" / "confusion.csv").read_text().splitlines()))
    assert table[0] == ["true class", *result.class_names]
    assert [[int(cell) for cell in row[1:]] for row in table[1:]] == result.confusion.tolist()


def test_every_image_counts_once_whatever_the_batch(class_folder: Path, source: Source):
    """But for a bad one, which is named."""
    (class_folder / "train" / "bee" / "1.png").write_bytes(b"x")
    model, good = tiny_model(["ant", "bee", "cat"]), [*range(7), *range(8, 20)]
    results = [
        am.evaluate(model, f"{class_folder}:train", batch_size=size, num_workers=0, device="cpu")
        for size in (1, 7, 64)
    ]
    for result in results:
        assert result.indices.tolist() == good
        assert result.labels.tolist() == source.labels[good].tolist()
        np.testing.assert_allclose(result.probabilities, results[0].probabilities, atol=1e-6)
        assert [(image.index, Path(image.name).name) for image in result.bad] == [(7, "1.png")]
    assert results[0].to_json()["bad_images"][0]["error"] == "the file is not an image"


def test_the_order_of_classes_does_not_matter(class_folder: Path):
    model, turned = tiny_model(["ant", "bee", "cat"]), tiny_model(["cat", "ant", "bee"])
    for name in ("weight", "bias"):
        getattr(turned.head, name).data = getattr(model.head, name).data[[2, 0, 1]].clone()
    found = [am.evaluate(net, str(class_folder), num_workers=0) for net in (model, turned)]
    assert found[0].top1 == found[1].top1
    named = [[e.class_names[i] for i in e.predictions] for e in found]
    assert named[0] == named[1]


def same(first: am.Evaluation, second: am.Evaluation) -> bool:
    names = ("labels", "indices", "logits", "probabilities")
    equal = all(np.array_equal(getattr(first, n), getattr(second, n)) for n in names)
    return equal and first.bad == second.bad and dict(first.figures()) == dict(second.figures())


@pytest.mark.parametrize("size", [2, 3, 5, 11])
def test_parts_are_the_whole_bit_for_bit(class_folder: Path, size: int):
    """Eleven processes for seven batches: some have nothing to do."""
    (class_folder / "train" / "bee" / "1.png").write_bytes(b"x")
    model, source = tiny_model(["ant", "bee", "cat"]), open_source(f"{class_folder}:train")
    whole = am.evaluate(model, source, batch_size=3, num_workers=0)
    predictor = Predictor(model, precision="float32", batch_size=3, num_workers=0)
    parts: list[Any] = []

    class Gathering(World):
        def gather(self, value: Any) -> list[Any]:
            parts.append(value)
            return parts

    for rank in range(size):
        with contextlib.suppress(am.UserError):  # only empty parts until now
            joined = evaluate_source(predictor, source, world=Gathering(rank, size))
    assert same(joined, whole)
    assert (len(whole.labels), len(whole.bad)) == (19, 1)
    assert (min(len(part["labels"]) for part, _ in parts) == 0) == (size == 11)


def test_logits_that_are_too_large_are_not_kept(class_folder: Path, monkeypatch):
    """The same numbers, in memory that does not grow with the classes."""
    model = tiny_model(["ant", "bee", "cat", "dog", "eel", "fox"])
    model.decision = Decision(unsure_below=0.2)
    options = {"num_workers": 0, "batch_size": 4, "allow_missing_classes": True}
    whole = am.evaluate(model, str(class_folder), **options)
    monkeypatch.setattr("allmlp.evaluation.metrics.LARGEST_LOGITS", 4 * 9 * 6 - 1)
    sizes, plain = [], am.Evaluation.without_logits

    def without(found: am.Evaluation) -> am.Evaluation:
        sizes.append(len(found.labels))
        return plain(found)

    monkeypatch.setattr(am.Evaluation, "without_logits", without)
    few = am.evaluate(model, str(class_folder), **options)
    assert few.logits.shape == (9, 0)
    assert sizes == [0, 4, 4, 1]  # of every batch at once: no process holds or sends all of them
    note = few.warnings()[-1]
    assert "were not kept" in note
    same = {"warnings": [], "environment": {}}  # which has the time
    assert {**few.to_json(), **same} == {**whole.to_json(), **same}
    assert few.worst_confusions(9) == whole.worst_confusions(9)
    assert few.mistakes().tolist() == whole.mistakes().tolist()
    assert [few.predicted(n) for n in range(9)] == [whole.predicted(n) for n in range(9)]
    assert fitted(few, "x").temperature == 1.0
    poison = lambda *outputs: outputs[2] * float("inf")  # noqa: E731
    model.register_forward_hook(poison)
    with pytest.raises(am.UserError, match="not finite"):
        am.evaluate(model, str(class_folder), **options)


def test_logits_that_are_not_finite_are_refused(class_folder: Path):
    model, calls = tiny_model(["ant", "bee", "cat"]), []

    def spoil(_module: object, _inputs: object, logits: object) -> object:
        calls.append(logits)
        return logits * float("nan") if len(calls) == 2 else logits

    model.register_forward_hook(spoil)
    with pytest.raises(am.UserError, match="the logits of 2 of 9 images are not finite: nan") as no:
        am.evaluate(model, str(class_folder), batch_size=2, num_workers=0)
    assert no.value.where == str(class_folder / "val" / "ant" / "2.png")
    assert len(calls) == 5


def test_what_cannot_be_measured(class_folder: Path):
    with pytest.raises(am.UserError, match="knows one class only, 'ant'"):
        am.evaluate(tiny_model(["ant"]), str(class_folder), num_workers=0)
    with pytest.raises(am.UserError, match="the model has no head"):
        am.evaluate(tiny_model(num_classes=0), str(class_folder), num_workers=0)
    for path in (class_folder / "val").rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(am.UserError, match="none of the images can be decoded"):
        am.evaluate(tiny_model(["ant", "bee", "cat"]), str(class_folder), num_workers=0)


@pytest.mark.parametrize("bins", [1, 15])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_against_a_direct_loop(bins: int, kind: type):
    random = np.random.default_rng(bins)
    confidence = random.uniform(0.05, 1.0, size=2000).astype(kind)
    right = random.random(2000) < confidence**2
    found, error = reliability(confidence, right, bins), 0.0
    for number, row in enumerate(found.to_json()):
        inside = (confidence > kind(number / bins)) & (confidence <= kind((number + 1) / bins))
        assert row["images"] == inside.sum()
        if inside.any():
            accuracy, mean = right[inside].mean(), confidence[inside].astype(float).mean()
            assert (row["accuracy"], row["confidence"]) == pytest.approx((accuracy, mean))
            error += inside.mean() * abs(accuracy - mean)
    assert found.error == pytest.approx(error, abs=1e-12)
    assert found.error > 0.1
    edges = (np.arange(1, bins + 1) / bins).astype(kind)  # an edge belongs to the bin below it
    assert reliability(edges, edges > 0, bins).images.tolist() == [1] * bins
    above = reliability(np.nextafter(edges[:-1], kind(1.0)), edges[:-1] > 0, bins)
    assert above.images.tolist() == [0] + [1] * (bins - 1)
