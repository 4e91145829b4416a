"""The linear probe against scikit-learn."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.preprocessing import StandardScaler

from allmlp.data.groups import stratified_folds
from allmlp.evaluation.probe import FOLDS, fit_probe, out_of_fold


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """600 digits; their scales differ, some features are constant, some depend on others."""
    found = load_digits()
    values = found.data[:600] * np.geomspace(0.01, 100, 64)
    return np.concatenate([values, values[:, :8] + 3], axis=1), found.target[:600]


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_equals_scikit_learn(digits: tuple[np.ndarray, np.ndarray], l2: float) -> None:
    features, labels = digits
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=1 / (l2 * len(features)), solver="newton-cg", tol=1e-9)
    theirs = model.fit(scaler.transform(features), labels)
    others = features[::-1] * 0.9  # standardised by the training images' statistics
    ours = fit_probe(features, labels, 10, l2=l2).logits(others).softmax(1).numpy()
    assert np.abs(ours - theirs.predict_proba(scaler.transform(others))).max() < 1e-4


def test_several_labels_equal_a_regression_each(digits: tuple[np.ndarray, np.ndarray]) -> None:
    features, digit = digits
    labels = np.stack([digit % 2 == 0, digit > 6, digit == 3, digit < 0], axis=1)
    x, ours = StandardScaler().fit_transform(features), fit_probe(features, labels, 4, l2=1e-2)
    found = ours.logits(features).sigmoid().numpy()
    for number in range(3):
        model = LogisticRegression(C=100 / len(features), solver="newton-cg", tol=1e-9)
        theirs = model.fit(x, labels[:, number]).predict_proba(x)[:, 1]
        assert np.abs(found[:, number] - theirs).max() < 1e-4
    assert found[:, 3].max() < 1e-20  # no image has it
    held_out = out_of_fold(features, labels, 4)
    assert log_loss(labels[:, 0], held_out[:, 0]) < 0.4


def test_out_of_fold_equals_scikit_learn(digits: tuple[np.ndarray, np.ndarray]) -> None:
    features, labels = digits
    folds = stratified_folds(labels, 3, seed=1)
    x = StandardScaler().fit_transform(features)
    losses, theirs, ours = {}, {}, out_of_fold(features, labels, 10, folds)
    for l2 in (1e-1, 1e-2, 1e-3, 1e-4):
        model = LogisticRegression(C=1 / (l2 * 400), solver="newton-cg", tol=1e-8)
        theirs[l2] = cross_val_predict(
            model, x, labels, cv=PredefinedSplit(folds), method="predict_proba"
        )
        losses[l2] = log_loss(labels, theirs[l2])
    best = min(losses, key=lambda l2: losses[l2])
    assert np.abs(ours - theirs[best]).max() < 1e-4
    assert log_loss(labels, ours) == pytest.approx(losses[best], abs=1e-6)
    assert np.array_equal(ours, out_of_fold(features, labels, 10, folds))


def test_folds_hold_every_class_evenly() -> None:
    labels = np.repeat([0, 1, 2], [50, 23, 1])
    folds = stratified_folds(labels, FOLDS)
    counts = np.array([np.bincount(labels[folds == fold], minlength=3) for fold in range(5)])
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert np.ptp(counts.sum(axis=1)) <= 1


def test_classes_without_images_are_improbable(digits: tuple[np.ndarray, np.ndarray]) -> None:
    """Of 13 classes two have no image, and one has a single image: absent from its own fold."""
    features, labels = digits[0][:200], digits[1][:200].copy()
    labels[0] = 11
    probe = fit_probe(features, labels, 13)
    assert np.isfinite(probe.weight).all()
    assert np.isfinite(probe.bias).all()
    assert probe.logits(features).softmax(1)[:, [10, 12]].max() < 1e-20
    held_out = out_of_fold(features, labels, 13)
    assert held_out[0, 11] < 1e-20
    np.testing.assert_allclose(held_out.sum(axis=1), 1)
    assert (held_out.argmax(axis=1) == labels).mean() > 0.8
