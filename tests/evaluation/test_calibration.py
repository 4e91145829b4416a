"""The expected calibration error: against a plain loop, and cases by hand."""

from __future__ import annotations

import numpy as np
import pytest

from allmlp.evaluation.metrics import reliability

pytestmark = pytest.mark.numerics


def direct(confidence: np.ndarray, right: np.ndarray, bins: int) -> float:
    """The definition, image by image, in float64."""
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [at for at, each in enumerate(confidence) if low < float(each) <= high]
        if inside:
            accuracy = sum(bool(right[at]) for at in inside) / len(inside)
            mean = sum(float(confidence[at]) for at in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_against_a_direct_loop(bins: int, kind: type):
    random = np.random.default_rng(bins)
    confidence = random.uniform(0.05, 1.0, size=2000).astype(kind)
    right = random.random(2000) < confidence**2
    found = reliability(confidence, right, bins)
    assert found.error == pytest.approx(direct(confidence, right, bins), abs=1e-12)
    assert found.error > 0.1
    assert found.images.sum() == 2000
    assert found.correct.sum() == right.sum()


def test_by_hand():
    """0.9 twice, one right: |0.5 - 0.9|. 0.55 once, right: |1 - 0.55|. 0.3 once, wrong: 0.3."""
    confidence = np.array([0.9, 0.55, 0.9, 0.3])
    found = reliability(confidence, np.array([True, True, False, False]))
    assert found.error == pytest.approx((2 * 0.4 + 0.45 + 0.3) / 4)
    rows = [row for row in found.to_json() if row["images"]]
    assert [row["images"] for row in rows] == [1, 1, 2]
    assert [row["accuracy"] for row in rows] == [0.0, 1.0, 0.5]
    assert [row["confidence"] for row in rows] == pytest.approx([0.3, 0.55, 0.9])
    assert (rows[2]["above"], rows[2]["up_to"]) == pytest.approx((13 / 15, 14 / 15))
    empty = found.to_json()[0]
    assert (empty["images"], empty["confidence"], empty["accuracy"]) == (0, None, None)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_an_edge_belongs_to_the_bin_below_it(kind: type):
    edges = (np.arange(1, 16) / 15).astype(kind)
    found = reliability(edges, np.ones(15, dtype=bool))
    assert found.images.tolist() == [1] * 15
    above = reliability(np.nextafter(edges[:-1], kind(1.0)), np.ones(14, dtype=bool))
    assert above.images.tolist() == [0] + [1] * 14
