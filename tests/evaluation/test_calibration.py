"""Temperature and threshold: against scipy, and on a run's own held-out images."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax
from sklearn.metrics import f1_score

import allmlp as am
from allmlp.evaluation.calibration import fit_temperature, fitted, summary, with_threshold
from allmlp.evaluation.metrics import best_thresholds
from allmlp.evaluation.options import CalibrateOptions
from allmlp.options import make
from conftest import ran, tiny_model, tiny_run, user_error


def measured(images: int, sharpness: float = 3.0, seed: int = 0) -> am.Evaluation:
    """Logits whose softmax is `sharpness` times too extreme."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(images, 5)) * 2
    labels = np.array([random.choice(5, p=np.exp(row) / np.exp(row).sum()) for row in logits])
    scaled = (logits * sharpness).astype(np.float32)
    return am.Evaluation("x", list("abcde"), labels, np.arange(images), scaled)


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 7.0])
def test_the_temperature_equals_scipys(sharpness: float):
    result = measured(900, sharpness)
    logits, labels = result.logits.astype(np.float64), result.labels

    def softmax_loss(log_temperature: float) -> float:
        rows = log_softmax(logits / np.exp(log_temperature), axis=1)
        return -rows[np.arange(len(labels)), labels].mean()

    several = (np.random.default_rng(1).random(logits.shape) < expit(logits / 2)).astype(np.int64)

    def sigmoid_loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return (np.logaddexp(0, scaled) - several * scaled).mean()

    for loss, truth in ((softmax_loss, labels), (sigmoid_loss, several)):
        expected = np.exp(minimize_scalar(loss, bracket=(-1, 1), options={"xtol": 1e-12})["x"])
        assert fit_temperature(result.logits, truth) == pytest.approx(expected, rel=1e-6)
    assert fit_temperature(result.logits, labels) == pytest.approx(sharpness, rel=0.15)


def test_the_calibration_error_falls_on_new_images_and_top1_stays():
    held_out, new = measured(400, seed=1), measured(2000, seed=2)
    decision = fitted(held_out, "x")
    before, top1 = new.reliability.error, new.top1
    loss = new.loss
    after = dataclasses.replace(new, decision=decision)
    assert after.reliability.error < before / 3
    assert (after.top1, after.loss) == (top1, loss)
    figures = dict(after.figures())
    assert figures["uncalibrated_error"] == pytest.approx(before)
    entry = decision.measured["temperature"]
    assert entry["images"] == 400
    assert entry["ece_after"] < entry["ece_before"] / 2
    assert entry["loss_after"] < entry["loss_before"]


def test_no_temperature_where_none_can_be_known():
    assert fitted(measured(99), "x") == am.Decision()  # too few
    assert fitted(measured(3000, sharpness=1.0), "x").temperature == pytest.approx(1.0, abs=0.1)
    right = measured(300)
    right.labels = right.predictions  # the loss falls to 0 as the temperature does
    assert np.isnan(fit_temperature(right.logits, right.labels))
    assert fitted(right, "x") == am.Decision()
    random = measured(300)
    random.logits[:] = 0
    assert fitted(random, "x") == am.Decision()


def lowest(confidences: np.ndarray, correct: np.ndarray, accuracy: float) -> float:
    """The lowest threshold with this accuracy, by trying all of them."""
    return min(t for t in confidences if correct[confidences >= t].mean() >= accuracy)


@pytest.mark.parametrize("rounded", [False, True])  # with ties
def test_the_threshold_for_an_accuracy(rounded: bool):
    result = measured(500)
    if rounded:
        result.logits[:] = result.logits.round()
    for wanted in (0.5, 0.7, 0.8):
        found = with_threshold(result, "x", accuracy=wanted, unsure_below=None)
        assert found.unsure_below == lowest(result.confidences, result.correct, wanted)
        answered = dict(dataclasses.replace(result, decision=found).figures())
        assert answered["coverage"] == (result.confidences >= found.unsure_below).mean()
        assert answered["accuracy_answered"] >= wanted
        halves = (slice(0, None, 2), slice(1, None, 2))
        limits = [lowest(result.confidences[h], result.correct[h], wanted) for h in halves]
        others = result.confidences >= np.tile(limits[::-1], 250)  # that of the other half
        entry = found.measured["unsure_below"]
        assert entry["coverage"] == others.mean()
        assert entry["accuracy"] == result.correct[others].mean()
    assert with_threshold(result, "x", accuracy=None, unsure_below=0.3).unsure_below == 0.3
    result.labels = (result.predictions + 1) % 5
    with user_error("out-of-range"):
        with_threshold(result, "x", accuracy=0.5, unsure_below=None)


def test_what_is_measured_of_thresholds_per_class_does_not_profit_from_their_choice():
    """Labels by chance: what suits these images best means nothing for others."""
    random = np.random.default_rng(0)
    labels = random.random((60, 40)) < 0.5
    logits = random.normal(size=(60, 40)).astype(np.float32)
    names, rows = [f"c{at}" for at in range(40)], np.arange(60)
    result = am.Evaluation("x", names, labels, rows, logits, decision=am.Decision(labels="multi"))
    decision = fitted(result, "x")
    answers = np.empty_like(labels)
    for own, other in ((slice(0, 60, 2), slice(1, 60, 2)), (slice(1, 60, 2), slice(0, 60, 2))):
        answers[own] = logits[own] >= best_thresholds(labels[other], logits[other])
    f1 = decision.measured["thresholds"]["f1_after"]
    assert f1 == pytest.approx(f1_score(labels, answers, average="macro"), abs=1e-6)
    assert f1 < dataclasses.replace(result, decision=decision).macro_f1 - 0.02
    one = dataclasses.replace(result, labels=labels[:1], logits=logits[:1], indices=rows[:1])
    assert fitted(one, "x").measured["thresholds"]["images"] == 1


def test_mistakes():
    for given, code in (
        ({"accuracy": 0.9, "unsure_below": 0.9}, "conflict"),
        ({"accuracy": 1.5}, "out-of-range"),
        ({"unsure_below": -0.1}, "out-of-range"),
    ):
        with user_error(code):
            make(CalibrateOptions, None, {"data": "x", **given})


def test_a_run_calibrates_itself_and_answers_unsure(trained, tmp_path, capsys):
    run = trained.run_folder
    model = am.load_model(run)
    expected = fit_temperature(trained.validation.logits, trained.validation.labels)
    assert model.decision.temperature == expected
    assert trained.test.decision == model.decision
    card = (run / "best/README.md").read_text()
    assert "fitted on" in card
    assert "not calibrated" not in card
    output = tmp_path / "sure"
    flags = ("--data", "digits:validation", "--accuracy", 0.99)
    out, _ = ran(capsys, "calibrate", run, output, *flags)
    sure = am.load_model(output)
    threshold = sure.decision.unsure_below
    assert '"unsure" below' in (output / "README.md").read_text()
    assert str(tmp_path) not in (output / "config.json").read_text()
    assert re.search(r"0\.9 +\d", out)
    result = am.evaluate(sure, "digits:validation")
    assert dict(result.figures())["accuracy_answered"] >= 0.99
    ran(capsys, "predict", output, "digits:test", "--output", tmp_path / "p.csv")
    rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()]
    assert rows[0][:4] == ["path", "answer", "class_1", "probability_1"]
    for row in rows[1:]:
        assert row[1] == (row[2] if float(row[3]) >= threshold else "unsure")
    assert {"unsure"} < {row[1] for row in rows[1:]}
    never = am.predict(output, "digits:test", unsure_below=0.0)
    assert all(row.answers == [row.classes[0][0]] for row in never)
    always = am.predict(run, "digits:test", unsure_below=1.0, output=tmp_path / "p.jsonl")
    assert all(row.answers == [] for row in always if row.classes[0][1] < 1)
    first = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert first["answer"] == "unsure"


def test_few_held_out_images_leave_the_model_as_it_is(class_folder: Path, tmp_path: Path):
    result = tiny_run(class_folder, tmp_path / "run")
    assert am.load_model(result.run_folder).decision == am.Decision()
    assert "decision" not in json.loads((tmp_path / "run/best/config.json").read_text())
    assert "not calibrated" in (tmp_path / "run/best/README.md").read_text()


def test_a_threshold_for_several_labels_is_refused_at_once():
    model = tiny_model(num_classes=["a", "b"])
    model.decision = am.Decision(labels="multi")
    with user_error("wrong-type"):
        am.calibrate(model, "no such data", accuracy=0.9)


def test_no_answer_at_all_is_said():
    result = measured(200, sharpness=0.1)
    decision = with_threshold(result, "x", accuracy=None, unsure_below=1.0)
    assert decision.measured["unsure_below"]["accuracy"] is None
    assert any("none of 200 images" in line for line in summary(decision))
