"""Draws against a literal copy of the rule, the solver against direct solves, both protocols."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import allmlp as am
from allmlp.data.source import subset
from allmlp.data.sources import open_splits
from allmlp.evaluation.features import frozen_features
from allmlp.evaluation.few_shot import SWEEP, choose_l2, fit_sweep
from allmlp.evaluation.predictor import Predictor
from allmlp.models.layers import preprocessing_of
from conftest import make_class_folder, make_colours, tiny_model

pytestmark = pytest.mark.numerics

FAST: dict[str, Any] = {"num_workers": 0, "batch_size": 16, "device": "cpu"}


def drawn_features(n: int, c: int, classes: int = 4, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(0, classes, n - classes)])
    scale = np.exp(random.normal(size=c))
    values = (random.normal(size=(n, c)) + random.normal(size=(classes, c))[labels]) * scale + 3
    return values.astype(np.float32), labels


def standardized(features: Any, shots: Any) -> np.ndarray:
    shots = shots.astype(np.float64)
    x = (features - shots.mean(axis=0)) / (shots.std(axis=0) + 1e-5)
    return np.hstack([x, np.full((len(x), 1), 100.0)])


@pytest.mark.parametrize(("n", "c"), [(9, 40), (200, 12), (16, 16), (17, 16), (4, 1)])
@pytest.mark.parametrize("l2", [1024.0, 1.0])
def test_against_a_direct_solve(n: int, c: int, l2: float):
    values, labels = drawn_features(n, c)
    others, _ = drawn_features(30, c, seed=1)
    x, y = standardized(values, values), 2.0 * np.eye(4)[labels] - 1.0
    expected = np.linalg.solve(x.T @ x + l2 * np.eye(c + 1), x.T @ y)
    _, probe = fit_sweep(values, labels, 4, [7.0, l2])
    np.testing.assert_allclose(probe.weights, expected, atol=1e-6, rtol=1e-6)
    scores = standardized(others, values) @ expected
    np.testing.assert_allclose(probe.scores(others), scores, atol=1e-6)
    assert (probe.predict(others) == scores.argmax(axis=1)).all()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three separable classes; one has fewer images to learn from."""
    make_colours(tmp_path / "data" / "train", {"blue": 9, "green": 2, "red": 7})
    make_colours(tmp_path / "data" / "test", {"blue": 4, "green": 3, "red": 5}, start=1)
    return tmp_path / "data"


def test_separable_classes_are_all_right(data: Path):
    result = am.few_shot(tiny_model(), str(data), shots=(1, 2), **FAST)
    assert (result.num_train, result.num_test, result.num_classes) == (18, 12, 3)
    assert (result.test_split, result.seeds, result.notes) == ("test", (0, 1, 2), [])
    assert result.preprocessing.resize == "resize-crop"
    assert result.accuracies == {shots: dict.fromkeys((0, 1, 2), 1.0) for shots in (1, 2)}
    # All images of a class with fewer are taken; among more of the others a large l2 forgets it.
    result = am.few_shot(tiny_model(), str(data), shots=(5,), **FAST)
    assert am.few_shot(tiny_model(), str(data), shots=(5,), l2=1e-3, **FAST).mean(5) == 1.0
    assert 0.5 < result.mean(5) < 1.0
    (note,) = result.notes
    assert note.startswith("5 shots: 1 of 3 classes have fewer training images ('green' has 2)")


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes that nothing tells apart, so that every choice of images shows."""
    folder = tmp_path_factory.mktemp("noise")
    names = "abcde"
    make_class_folder(folder / "train", {name: 6 + at for at, name in enumerate(names)})
    make_class_folder(folder / "val", dict.fromkeys(names, 12), start=500)
    return folder


def features_of(model: am.ImageClassifier, folder: Path) -> tuple[Any, ...]:
    """Features and labels of the training images, then of the test images, without a draw."""
    preprocessing = replace(preprocessing_of(model), resize="resize-crop")
    predictor = Predictor(model, preprocessing=preprocessing, num_workers=0)
    splits = open_splits(str(folder))
    found = [
        (frozen_features(predictor, splits[name]).values, splits[name].labels) for name in splits
    ]
    return (*found[0], *found[1])


def literal(known: tuple[Any, ...], shots: int, seed: int) -> float:
    """The rule, copied: a draw for each class, a direct solve."""
    train, labels, test, truth = known
    rng = np.random.default_rng(seed)
    order = [rng.permutation(np.where(labels == label)[0]) for label in range(5)]
    chosen = np.concatenate([indices[:shots] for indices in order])
    x, y = standardized(train[chosen], train[chosen]), 2.0 * np.eye(5)[labels[chosen]] - 1.0
    weights = np.linalg.solve(x.T @ x + 1024.0 * np.eye(x.shape[1]), x.T @ y)
    guess = (standardized(test, train[chosen]) @ weights).argmax(axis=1)
    return float((guess == truth).mean())


def test_the_draws_are_those_of_the_rule(noise: Path):
    model = tiny_model()
    shots, seeds = (1, 3, 5), (0, 1, 7)
    result = am.few_shot(model, str(noise), shots=shots, seeds=seeds, **FAST)
    known = features_of(model, noise)
    expected = {n: {seed: literal(known, n, seed) for seed in seeds} for n in shots}
    assert result.accuracies == expected
    assert len({value for found in expected.values() for value in found.values()}) > 3
    assert result.test_split == "validation"
    values = list(expected[3].values())
    assert result.mean(3) == pytest.approx(np.mean(values))
    assert result.deviation(3) == pytest.approx(np.std(values, ddof=1))
    again = am.few_shot(model, open_splits(str(noise)), shots=(5, 3), seeds=(7,), **FAST)
    assert again.accuracies == {n: {7: expected[n][7]} for n in (5, 3)}
    assert again.data == str(noise)


def test_only_drawn_images_are_computed(noise: Path, tmp_path: Path):
    given = {"shots": (1,), "seeds": (0,), "cache": str(tmp_path / "cache"), **FAST}
    seen: list[int] = []
    first, second = (
        am.few_shot(tiny_model(), noise, on_batch=lambda batch: seen.append(len(batch)), **given)
        for _ in range(2)
    )
    assert first.num_computed == sum(seen) == 5 + 60
    assert (second.num_computed, second.accuracies) == (0, first.accuracies)


def test_bad_images_give_way_to_the_next(noise: Path, tmp_path: Path):
    folder = shutil.copytree(noise, tmp_path / "noise")
    order = np.random.default_rng(3).permutation(6)  # of the first class
    drawn = [folder / "train" / "a" / f"{at}.png" for at in order[:2]]
    for path in drawn:
        path.write_bytes(b"damaged")
    given = {"shots": (1, 2, 20), "seeds": (3,), **FAST}
    found = am.few_shot(tiny_model(), str(folder), **given)
    assert sorted(image.name for image in found.bad) == sorted(map(str, drawn))
    assert sorted(image.index for image in found.bad) == sorted(order[:2])
    assert "20 shots: 5 of 5 classes have fewer training images ('a' has 4)" in found.notes[0]
    for path in drawn:
        path.unlink()
    without = am.few_shot(tiny_model(), str(folder), **given)
    # All that are left are taken, so the draw does not matter: as if the bad ones were not there.
    assert found.accuracies[20] == without.accuracies[20]
    assert without.bad == []


def test_the_older_protocol(noise: Path):
    model = tiny_model()
    result = am.few_shot(model, open_splits(str(noise)), shots=(1, 3), protocol="scenic", **FAST)
    train, labels, test, truth = features_of(model, noise)
    for shots in (1, 3):
        chosen = np.concatenate([np.flatnonzero(labels == label)[:shots] for label in range(5)])
        found = result.sweep[shots]
        probes = fit_sweep(train[chosen], labels[chosen], 5, SWEEP)
        for l2, probe in zip(SWEEP, probes, strict=True):
            assert found[l2] == float((probe.predict(test) == truth).mean())
        assert result.accuracies[shots] == {0: max(found.values())}
        assert result.l2[shots] == max(l2 for l2 in SWEEP if found[l2] == max(found.values()))
    assert (result.seeds, result.deviation(1)) == ((), None)


def test_one_l2_for_several_data_sets(noise: Path):
    result = am.few_shot(tiny_model(), str(noise), shots=(1,), protocol="scenic", **FAST)

    def swept(accuracies: Any) -> am.FewShot:
        return replace(result, sweep={1: dict(zip(SWEEP, accuracies, strict=True))})

    numbers = np.linspace(0.1, 0.4, len(SWEEP))
    # Worse and worse but for one, which is the best of these and in the middle of the others.
    values = numbers[::-1].copy()
    values[15] = 0.9
    both = choose_l2([swept(numbers), swept(values)])
    assert [found.l2 for found in both] == [{1: SWEEP[15]}] * 2
    assert [found.accuracies for found in both] == [{1: {0: numbers[15]}}, {1: {0: 0.9}}]
    assert choose_l2([swept([0.5] * len(SWEEP))])[0].l2 == {1: 2.0**19}


def test_a_random_baseline(noise: Path):
    model = tiny_model().train()
    torch.nn.init.normal_(model.stem.weight)
    given = {"shots": (3,), "random_baseline": True, **FAST}
    first, again = am.few_shot(model, noise, **given), am.few_shot(model, noise, **given)
    assert first.baseline == again.baseline
    twin = am.random_weights(model)
    assert first.baseline == replace(am.few_shot(twin, noise, shots=(3,), **FAST), notes=[])
    assert first.accuracies != first.baseline.accuracies


def test_a_cache_that_cannot_be_written_is_a_note(noise: Path):
    result = am.few_shot(tiny_model(), noise, shots=(3,), **FAST, cache="/proc/nowhere")
    assert any("/proc/nowhere" in note for note in result.notes)


@pytest.mark.parametrize(
    "settings",
    [
        {"shots": (0,)},
        {"shots": (5, 1, 5)},
        {"seeds": ()},
        {"l2": float("nan")},
        {"resize_weights": "resample"},
    ],
)
def test_wrong_options(settings: dict[str, Any]):
    with pytest.raises(am.UserError, match=next(iter(settings))):
        am.few_shot(tiny_model(), "digits", **settings)


def test_data_that_is_refused(data: Path):
    model, splits = tiny_model(), open_splits(str(data))
    one = subset(splits["train"], np.arange(9), "only blue")
    with pytest.raises(am.UserError, match=r"two classes or more .*\['blue'\]"):
        am.few_shot(model, {"train": one, "test": splits["test"]}, **FAST)
    for path in (data / "test").rglob("*.png"):
        path.write_bytes(b"damaged")
    with pytest.raises(am.UserError, match="none of the test images can be decoded"):
        am.few_shot(model, str(data), **FAST)
    for path in [*data.glob("train/red/*"), *data.glob("train/green/*")]:
        path.write_bytes(b"damaged")
    with pytest.raises(am.UserError, match="fewer than two classes have images that can be"):
        am.few_shot(model, str(data), shots=(1,), **FAST)
