"""A linear probe: multinomial logistic regression on frozen features; with several labels per image
(multi-hot) a logistic regression per class.

It minimises  mean cross-entropy + l2 / 2 * |W|^2  over weights W of standardised features and a
bias that is not penalised: scikit-learn's LogisticRegression with C = 1 / (l2 * N). The strength l2
is the one with the lowest log loss on held-out folds; several labels share one.

Shapes: N images, C features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from allmlp.data.groups import stratified_folds

L2S = tuple(10.0**power for power in range(1, -7, -1))  # strongest first
FOLDS = 5
_MOST_STEPS, _TOLERANCE = 200, 1e-8  # of Newton and of conjugate gradients; of the gradient
_ABSENT = -100.0  # bias of a class without images: finite, and a probability of nearly 0


class Probe(NamedTuple):
    """A linear classifier of raw features: logits = features @ weight.T + bias."""

    weight: np.ndarray  # float64 (K, C)
    bias: np.ndarray  # float64 (K,)
    l2: float

    def logits(self, features: np.ndarray) -> Tensor:
        """Returns float64 (N, K) for features (N, C)."""
        return torch.from_numpy(features.astype(np.float64) @ self.weight.T + self.bias)


def fit_probe(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2: float | None = None
) -> Probe:
    """Fits a probe to features (N, C) and labels (N,), or multi-hot (N, K), by default with the l2
    of five folds."""
    x, mean, std = _standardised(features)
    truth = torch.from_numpy(labels)
    if l2 is None:
        l2, _ = _cross_validate(x, truth, num_classes, stratified_folds(labels, FOLDS))
    weights = _solve(x, truth, num_classes, l2)
    weight = weights[:-1].T / std
    return Probe(weight.numpy(), (weights[-1] - weight @ mean).numpy(), l2)


def out_of_fold(
    features: np.ndarray, labels: np.ndarray, num_classes: int, folds: np.ndarray | None = None
) -> np.ndarray:
    """Returns the probabilities (N, K) of every image from the other folds, at the best l2."""
    folds = stratified_folds(labels, FOLDS) if folds is None else folds
    truth = torch.from_numpy(labels)
    return _cross_validate(_standardised(features)[0], truth, num_classes, folds)[1]


def log_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean over images; of multi-hot labels the sum over the classes."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    losses = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
    return losses.sum(1).mean()


def _standardised(features: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Returns standardised features with a constant 1, whose weight is the bias; mean and std."""
    raw = torch.from_numpy(features.astype(np.float64))
    mean, std = raw.mean(0), raw.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a constant feature gets no weight
    return torch.cat([(raw - mean) / std, torch.ones(len(raw), 1).double()], dim=1), mean, std


def _solve(
    x: Tensor, labels: Tensor, num_classes: int, l2: float, start: Tensor | None = None
) -> Tensor:
    """Returns the weights (C + 1, K) by Newton's method with a line search."""
    if labels.dim() == 1:
        present, targets = labels.unique(return_inverse=True)
        truth = F.one_hot(targets)
    else:
        present = labels.any(0).nonzero()[:, 0]
        targets = truth = labels[:, present].double()
    weights = x.new_zeros(x.shape[1], len(present)) if start is None else start[:, present]
    penalty = torch.full((x.shape[1], 1), l2, dtype=torch.float64)
    penalty[-1] = 0.0

    def loss(at: Tensor) -> Tensor:
        return log_loss(x @ at, targets) + (penalty * at.square()).sum() / 2

    for _ in range(_MOST_STEPS):
        p = _probabilities(x @ weights, labels)
        gradient = x.T @ (p - truth) / len(x) + penalty * weights
        if gradient.abs().max() < _TOLERANCE:
            break

        def hessian(v: Tensor, p: Tensor = p) -> Tensor:
            u = p * (x @ v)
            total = u.sum(1, keepdim=True) if labels.dim() == 1 else u
            return x.T @ (u - p * total) / len(x) + penalty * v

        step = _conjugate_gradients(hessian, -gradient)
        size, slope = 1.0, 1e-4 * (gradient * step).sum()
        now = loss(weights) * (1 + 1e-14)  # rounding does not count
        while size > 1e-6 and loss(weights + size * step) > now + size * slope:
            size /= 2
        weights = weights + size * step
    found = x.new_zeros(x.shape[1], num_classes)
    found[-1] = _ABSENT
    found[:, present] = weights
    return found


def _probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(1) if labels.dim() == 1 else logits.sigmoid()


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
    x: Tensor, labels: Tensor, num_classes: int, folds: np.ndarray
) -> tuple[float, np.ndarray]:
    """Returns the last l2 before the log loss rises, and its out-of-fold probabilities."""
    held_out = [torch.from_numpy(folds == fold) for fold in np.unique(folds)]
    starts: list[Tensor | None] = [None] * len(held_out)
    best, least = (0.0, torch.empty(0)), torch.inf
    for l2 in L2S:
        logits = torch.empty(len(labels), num_classes, dtype=torch.float64)
        for fold, out in enumerate(held_out):
            starts[fold] = found = _solve(x[~out], labels[~out], num_classes, l2, starts[fold])
            logits[out] = x[out] @ found
        loss = log_loss(logits, labels).item()
        if loss >= least:
            break
        best, least = (l2, logits), loss
    return best[0], _probabilities(best[1], labels).numpy()
