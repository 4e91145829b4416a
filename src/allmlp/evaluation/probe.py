"""A linear probe: multinomial logistic regression on frozen features.

It minimises  mean cross-entropy + l2 / 2 * |W|^2  over weights W of standardised features and a
bias that is not penalised: scikit-learn's LogisticRegression with C = 1 / (l2 * N). The strength l2
is the one with the lowest log loss on held-out folds.

Shapes: N images, C features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from allmlp.data.source import stratified_folds

L2S = tuple(10.0**power for power in range(1, -7, -1))  # strongest first
FOLDS = 5
_MOST_STEPS, _TOLERANCE = 200, 1e-8  # of Newton and of conjugate gradients; of the gradient
_ABSENT = -100.0  # bias of a class without images: finite, and a probability of nearly 0


@dataclass(frozen=True)
class Probe:
    """A linear classifier of raw features: logits = features @ weight.T + bias.

    Attributes:
        weight: float64 (K, C).
        bias: float64 (K,).
        l2: strength of the penalty.
        log_loss: mean over the held-out images of all folds; None if l2 was given.
    """

    weight: np.ndarray
    bias: np.ndarray
    l2: float
    log_loss: float | None = None

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Returns float64 (N, K) for features (N, C)."""
        logits = features.astype(np.float64) @ self.weight.T + self.bias
        return torch.from_numpy(logits).softmax(1).numpy()


def fit_probe(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2: float | None = None
) -> Probe:
    """Fits a probe to features (N, C) and labels (N,), by default with the l2 of five folds."""
    data, log_loss = _Data(features, labels, num_classes), None
    if l2 is None:
        l2, log_loss, _ = _cross_validate(data, stratified_folds(labels, FOLDS), L2S)
    weight, bias = data.raw(data.solve(torch.ones(len(labels), dtype=torch.bool), l2))
    return Probe(weight, bias, l2, log_loss)


def out_of_fold(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    folds: np.ndarray | None = None,
    l2s: Sequence[float] = L2S,
) -> np.ndarray:
    """Returns the probabilities (N, K) of every image from the images of the other folds.

    Args:
        features, labels: (N, C) and int (N,).
        num_classes: K.
        folds: int (N,), the fold of every image; `stratified_folds` by default.
        l2s: strengths to choose from, strongest first; the best over all folds is used in each.
    """
    data = _Data(features, labels, num_classes)
    chosen = stratified_folds(labels, FOLDS) if folds is None else folds
    return _cross_validate(data, chosen, l2s)[2]


class _Data:
    """Standardised features with a constant 1, whose weight is the bias, and the solver."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
        raw = torch.from_numpy(features.astype(np.float64))
        self.mean, std = raw.mean(0), raw.std(0, correction=0)
        self.std = torch.where(std > 0, std, 1.0)  # a constant feature gets no weight
        self.x = torch.cat([(raw - self.mean) / self.std, torch.ones(len(raw), 1).double()], dim=1)
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.num_classes = num_classes

    def solve(self, used: Tensor, l2: float, start: Tensor | None = None) -> Tensor:
        """Returns the weights (C + 1, K) for the used images, by Newton's method."""
        x, present = self.x[used], self.labels[used].unique()
        targets = torch.searchsorted(present, self.labels[used])
        weights = x.new_zeros(x.shape[1], len(present)) if start is None else start[:, present]
        penalty = torch.full((x.shape[1], 1), l2, dtype=torch.float64)
        penalty[-1] = 0.0

        def loss(at: Tensor) -> Tensor:
            return F.cross_entropy(x @ at, targets) + (penalty * at.square()).sum() / 2

        for _ in range(_MOST_STEPS):
            p = (x @ weights).softmax(1)
            residual = p.clone()
            residual[torch.arange(len(x)), targets] -= 1
            gradient = x.T @ residual / len(x) + penalty * weights
            if gradient.abs().max() < _TOLERANCE:
                break

            def hessian(v: Tensor, p: Tensor = p) -> Tensor:
                u = p * (x @ v)
                return x.T @ (u - p * u.sum(1, keepdim=True)) / len(x) + penalty * v

            step = _conjugate_gradients(hessian, -gradient)
            size, slope = 1.0, 1e-4 * (gradient * step).sum()
            now = loss(weights) * (1 + 1e-14)  # rounding does not count
            while size > 1e-6 and loss(weights + size * step) > now + size * slope:
                size /= 2
            weights = weights + size * step
        found = x.new_zeros(x.shape[1], self.num_classes)
        found[-1] = _ABSENT
        found[:, present] = weights
        return found

    def raw(self, weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Returns weight (K, C) and bias (K,) in terms of the raw features."""
        weight = weights[:-1].T / self.std
        return weight.numpy(), (weights[-1] - weight @ self.mean).numpy()


def _conjugate_gradients(matrix: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Solves matrix(x) = target, the more accurately the smaller the target."""
    x, residual = torch.zeros_like(target), target
    direction, square = target, target.square().sum()
    enough = square * square.sqrt().clamp(max=0.25)
    for _ in range(_MOST_STEPS):
        product = matrix(direction)
        length = square / (direction * product).sum()
        x, residual = x + length * direction, residual - length * product
        square, before = residual.square().sum(), square
        if square <= enough:
            break
        direction = residual + square / before * direction
    return x


def _cross_validate(
    data: _Data, folds: np.ndarray, l2s: Sequence[float]
) -> tuple[float, float, np.ndarray]:
    """Returns the best l2, its log loss and its out-of-fold probabilities.

    The penalty weakens until the log loss rises, which spares the badly conditioned rest.
    """
    held_out = [torch.from_numpy(folds == fold) for fold in np.unique(folds)]
    starts: list[Tensor | None] = [None] * len(held_out)
    best: tuple[float, float, np.ndarray] | None = None
    for l2 in l2s:
        log_probabilities = torch.empty(len(folds), data.num_classes, dtype=torch.float64)
        for fold, out in enumerate(held_out):
            solution = starts[fold] = data.solve(~out, l2, starts[fold])
            log_probabilities[out] = (data.x[out] @ solution).log_softmax(1)
        log_loss = F.nll_loss(log_probabilities, data.labels).item()
        if best is not None and log_loss >= best[1]:
            break
        best = l2, log_loss, log_probabilities.exp().numpy()
    assert best is not None, "l2s is not empty"
    return best
