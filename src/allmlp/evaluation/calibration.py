"""Calibration on held-out images: a temperature, thresholds per class, a threshold for "unsure".

What is stored is fitted to all images; what is reported judges each half by a fit to the other.

Sources: Guo et al. 2017, "On Calibration of Modern Neural Networks" (one temperature, fitted by the
loss); Geifman and El-Yaniv 2017, "Selective Classification for Deep Neural Networks" (coverage and
accuracy of the answers above a threshold).

Shapes: N images, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from allmlp.decision import Decision
from allmlp.errors import UserError
from allmlp.evaluation.metrics import Evaluation, best_thresholds

_OF_IMAGES = ("logits", "labels", "indices")
LEAST_IMAGES = 100  # with fewer no temperature is fitted
_COLDEST, _HOTTEST = 0.05, 20.0  # the loss of correctly classified images alone has no minimum


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature with the lowest mean loss; NaN if it is not within 0.05 and 20.

    The loss is convex in 1 / temperature; Newton's method, with bisection where a step leaves the
    bracket. `logits` are (N, K); `labels` int (N,) for a softmax, or (N, K) for a sigmoid each.
    """
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    if _slope(low, logits, labels)[0] >= 0 or _slope(high, logits, labels)[0] <= 0:
        return np.nan
    inverse = following = 1.0
    for _ in range(100):
        slope, curvature = _slope(inverse, logits, labels)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        following = inverse - slope / curvature if curvature > 0 else low
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - inverse) <= 1e-10 * inverse:
            break
        inverse = following
    return 1 / following


def _slope(inverse: float, logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """First and second derivative of the summed loss with respect to 1 / temperature."""
    first = second = 0.0
    for at in range(0, len(logits), 1024):  # float64 copies of a few rows at a time
        rows = torch.from_numpy(logits[at : at + 1024]).double()
        truth = torch.from_numpy(labels[at : at + 1024])
        scale = torch.tensor(inverse, dtype=torch.float64, requires_grad=True)
        if truth.dim() == 2:
            loss = F.binary_cross_entropy_with_logits(scale * rows, truth.double(), reduction="sum")
        else:
            loss = F.cross_entropy(scale * rows, truth, reduction="sum")
        (slope,) = torch.autograd.grad(loss, scale, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, scale)
        first, second = first + slope.item(), second + curvature.item()
    return first, second


def _cross_fitted(result: Evaluation, fit: Callable[[Evaluation], Any]) -> np.ndarray:
    """Returns for every image, (N, ...), what `fit` gives for the other half of the images."""
    halves = [slice(start, None, 2) for start in range(2 if len(result.labels) > 1 else 1)]
    parts = [
        replace(result, **{name: getattr(result, name)[half] for name in _OF_IMAGES})
        for half in halves
    ]
    found = [fit(part) for part in reversed(parts)]
    return np.stack([found[at % len(found)] for at in range(len(result.labels))])


def _temperature(result: Evaluation) -> float:
    return fit_temperature(result.logits, result.labels)


def cross_calibrated(result: Evaluation) -> Evaluation:
    """Returns a result in which each half of the images has the temperature of the other half."""
    others = _cross_fitted(result, _temperature).astype(np.float32)
    decision = Decision(labels=result.decision.labels)
    return replace(result, logits=(result.logits.T / others).T, decision=decision)


def fitted(result: Evaluation, data: str) -> Decision:
    """Returns the decision of a result with the temperature, unless the images are few or it does
    not lower the loss, and the thresholds of several labels that suit these held-out images."""
    decision = Decision(labels=result.decision.labels)
    plain, about = replace(result, decision=decision), _about(result, data)
    measured: dict[Any, dict[str, Any]] = {}
    if len(result.labels) >= LEAST_IMAGES and result.rows is None:
        temperature, after = _temperature(plain), cross_calibrated(plain)
        if np.isfinite(temperature) and after.loss < plain.loss:
            decision = replace(decision, temperature=temperature)
            measured["temperature"] = about | {
                "loss_before": round(plain.loss, 6),
                "loss_after": round(after.loss, 6),
                "ece_before": round(plain.reliability.error, 6),
                "ece_after": round(after.reliability.error, 6),
            }
    if result.is_multi_label:
        limits = _thresholds(result) / decision.temperature
        decision = replace(decision, thresholds=torch.from_numpy(limits).sigmoid().tolist())
        others = _cross_fitted(plain, _thresholds)
        after = replace(plain, logits=plain.logits - others)  # so that a logit of 0 decides
        f1 = {"f1_before": round(plain.macro_f1, 6), "f1_after": round(after.macro_f1, 6)}
        measured["thresholds"] = about | f1
    return replace(decision, measured=measured)


def _about(result: Evaluation, data: str) -> dict[str, Any]:
    return {"data": data, "images": len(result.labels), "cross_fitted": True}


def _thresholds(result: Evaluation) -> np.ndarray:
    return best_thresholds(result.labels, result.logits)


def with_threshold(
    result: Evaluation, data: str, *, unsure_below: float | None, accuracy: float | None
) -> Decision:
    """Returns the decision of a result with a threshold, and what was measured at it.

    The threshold is `unsure_below`, or the one with the most answers that reach the accuracy.
    """
    own = result.decision
    if result.rows is not None:
        raise UserError(result.warnings()[-1], where=data, fix="Use a part of the images")

    def threshold(part: Evaluation) -> float:
        return _threshold(part, accuracy) if accuracy is not None else unsure_below or 0.0

    def of_half(part: Evaluation) -> float:
        scale = 1.0 if own.temperature == 1.0 else _temperature(part)
        return threshold(replace(part, decision=Decision(temperature=scale)))

    chosen = threshold(result)
    if not np.isfinite(chosen):
        what = f"no threshold reaches an accuracy of {accuracy:.2%}"
        raise UserError(what, where="accuracy", fix="A lower one", code="out-of-range")
    after = result if own.temperature == 1.0 else cross_calibrated(result)
    row = after.answered(_cross_fitted(result, of_half))
    entry = _about(result, data) | row | {"threshold": chosen}
    return replace(own.with_threshold(chosen), measured=own.measured | {"unsure_below": entry})


def _threshold(result: Evaluation, accuracy: float) -> float:
    """Returns the lowest threshold with this accuracy of the answers; infinity if none has it."""
    order = np.argsort(-result.confidences, kind="stable")
    confidences, correct = result.confidences[order], result.correct[order]
    reached = np.cumsum(correct) / np.arange(1, len(order) + 1)
    is_end = np.append(confidences[1:] < confidences[:-1], True)  # equal ones are answered together
    good = confidences[is_end & (reached >= accuracy)]
    return float(good[-1]) if len(good) else np.inf


_SUMMARIES = {
    "temperature": "temperature {value:.4g}, fitted on {images:,} images of {data}: expected "
    "calibration error {ece_before:.2%} before, {ece_after:.2%} after",
    "thresholds": "a threshold per class, chosen on {images:,} images of {data}: macro F1 "
    "{f1_before:.2%} at 0.5, {f1_after:.2%} with the thresholds",
    "unsure_below": '"unsure" below a probability of {value:.4g}, chosen on {images:,} images of '
    "{data}: {coverage:.2%} are answered, {accuracy:.2%} of these correctly",
    "nothing": '"unsure" below a probability of {value:.4g}: none of {images:,} images of {data} '
    "is answered",
}


def summary(decision: Decision) -> list[str]:
    """Returns sentences on what was measured for a decision, for the console and the model card."""
    lines = []
    for name, entry in decision.measured.items():
        with contextlib.suppress(KeyError, TypeError, ValueError):  # written by somebody else
            kind = "nothing" if entry.get("accuracy", 1.0) is None else name
            text = _SUMMARIES[kind].format(value=getattr(decision, name), **entry)
            lines.append(f"{text} (cross-fitted)" if entry.get("cross_fitted") else text)
    return lines
