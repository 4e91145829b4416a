"""Average precision and thresholds for several labels per image.

Shapes: N images, K classes.
"""

from __future__ import annotations

import numpy as np


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float | None:
    """Returns the average precision of one class, bool (N,) and float (N,), as scikit-learn's: the
    precision at each score times the recall gained there. None without a positive."""
    positives, true, predicted, _ = _counts(truth, scores)
    if not positives:
        return None
    gained = np.diff(true, prepend=0) / positives
    return float((gained * (true / predicted)).sum())


def best_thresholds(truth: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Returns the logits from which a class is predicted so that its F1 is highest, float64 (K,).

    Each lies in the middle between two scores; of equally good ones the one nearest to 0 (a
    probability of one half), which is also that of a class without a positive.
    """
    found = np.zeros(truth.shape[1])
    for number in range(truth.shape[1]):
        positives, true, predicted, scores = _counts(truth[:, number], logits[:, number])
        if not positives:
            continue
        f1 = 2 * true / (positives + predicted)
        lower = np.append(scores[1:], scores[-1] - 2.0)  # the last predicts the class for all
        middle = (scores + lower) / 2
        is_zero_between = (lower < 0) & (scores >= 0)
        middle[is_zero_between] = 0.0
        best = np.flatnonzero(f1 == f1.max())
        found[number] = middle[best[np.abs(middle[best]).argmin()]]
    return found


def _counts(
    truth: np.ndarray, scores: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the number of positives, and for each distinct score, highest first, the positives
    and the images from it on, and the score in float64."""
    order = np.argsort(-scores, kind="stable")
    ordered, sums = scores[order].astype(np.float64), np.cumsum(truth[order])
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    return int(sums[-1]), sums[ends], ends + 1, ordered[ends]
