"""L2-regularised linear regression on features, as a classifier; float64 throughout.

    X   the features, less their mean over the shots, over their deviation + 1e-5, and a constant
        feature of 100, so large that the bias it stands for is hardly regularised
    Y   +1 at the class of a shot, -1 at the others
    W   (X'X + l2)^-1 X'Y, which is X'(XX' + l2)^-1 Y: solved in the smaller of the dimensions

One eigendecomposition serves every l2. Source: big_vision evaluators/fewshot_lsr.py.

Shapes: N shots, C features, K classes, M other images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BIAS_FEATURE = 100.0
_BLOCK = 8192  # images that are scored at once


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of features."""

    mean: np.ndarray  # float64 (C,), of the shots
    std: np.ndarray  # float64 (C,), with the 1e-5 in it
    weights: np.ndarray  # float64 (C + 1, K); the last row belongs to the constant feature

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Returns float64 (M, K), higher for more likely classes; features are (M, C)."""
        return _standardized(features, self.mean, self.std) @ self.weights

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns int64 (M,), M above 0: the class of the highest score; features are (M, C)."""
        blocks = range(0, len(features), _BLOCK)
        parts = [self.scores(features[at : at + _BLOCK]).argmax(axis=1) for at in blocks]
        return np.concatenate(parts)


def fit_linear(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2: float = 1024.0
) -> LinearProbe:
    """Returns the classifier that fits the shots, (N, C) of labels (N,) from 0 to K - 1."""
    return next(fit_sweep(features, labels, num_classes, [l2]))


def fit_sweep(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2s: Sequence[float]
) -> Iterator[LinearProbe]:
    """Yields the classifier of `fit_linear` for each l2."""
    exact = features.astype(np.float64)
    mean, std = exact.mean(axis=0), exact.std(axis=0) + 1e-5
    x = _standardized(exact, mean, std)  # (N, C + 1)
    y = np.full((len(x), num_classes), -1.0)
    y[np.arange(len(x)), labels] = 1.0
    if x.shape[0] >= x.shape[1]:
        eigenvalues, vectors = np.linalg.eigh(x.T @ x)
        left, right = vectors, vectors.T @ (x.T @ y)
    else:
        eigenvalues, vectors = np.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, vectors.T @ y
    eigenvalues = np.maximum(eigenvalues, 0.0)  # rounding makes some of the zeros negative
    for l2 in l2s:
        yield LinearProbe(mean, std, (left / (eigenvalues + l2)) @ right)


def _standardized(features: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    x = (features.astype(np.float64) - mean) / std
    return np.concatenate([x, np.full((len(x), 1), BIAS_FEATURE)], axis=1)
