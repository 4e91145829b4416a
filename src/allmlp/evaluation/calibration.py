"""Calibration on held-out images: a temperature for the logits, and a threshold for "unsure".

Sources: Guo et al. 2017, "On Calibration of Modern Neural Networks" (one temperature, fitted by the
loss); Geifman and El-Yaniv 2017, "Selective Classification for Deep Neural Networks" (coverage and
accuracy of the answers above a threshold).

Shapes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from allmlp.console import table
from allmlp.decision import Decision
from allmlp.errors import UserError, between
from allmlp.evaluation.metrics import Evaluation
from allmlp.evaluation.multi_label import best_thresholds

LEAST_IMAGES = 100  # with fewer no temperature is fitted
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # of the printed table
_COLDEST, _HOTTEST = 0.05, 20.0  # the loss of correctly classified images alone has no minimum


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the temperature with the lowest mean loss; None if it is not within 0.05 and 20.

    The loss is convex in 1 / temperature; Newton's method, with bisection where a step leaves the
    bracket. `logits` are (N, K); `labels` int (N,) for a softmax, or (N, K) for a sigmoid each.
    """
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    if _slope(low, logits, labels)[0] >= 0 or _slope(high, logits, labels)[0] <= 0:
        return None
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
    """First and second derivative of the mean loss with respect to 1 / temperature."""
    totals = np.zeros(2)
    for at in range(0, len(logits), 1024):  # float64 copies of a few rows at a time
        rows = torch.from_numpy(logits[at : at + 1024]).double()
        truth = torch.from_numpy(labels[at : at + 1024])
        if truth.dim() == 2:
            p = (inverse * rows).sigmoid()
            first = (p - truth.double()) * rows
            second = p * (1 - p) * rows**2
        else:
            p = (inverse * rows).softmax(dim=1)
            mean = (p * rows).sum(dim=1, keepdim=True)
            first = mean - rows.gather(1, truth[:, None])
            second = p * (rows - mean) ** 2
        totals += float(first.sum()), float(second.sum())
    return float(totals[0] / len(logits)), float(totals[1] / len(logits))


def with_temperature(result: Evaluation, data: str) -> Decision:
    """Returns the decision of a result on held-out images with the temperature fitted on these.

    Thresholds are dropped: they hold for one temperature. No temperature is fitted with fewer than
    `LEAST_IMAGES`, or if it does not lower the loss of images that it was not fitted on. For this
    comparison, and for the calibration error after, each half of the images takes the temperature
    of the other half.
    """
    plain = replace(result, decision=Decision(labels=result.decision.labels))
    number = len(result.labels)
    if number < LEAST_IMAGES:
        return plain.decision
    scaled = result.logits.copy()
    for start in (0, 1):
        found = fit_temperature(result.logits[1 - start :: 2], result.labels[1 - start :: 2])
        if found is None:
            return plain.decision
        scaled[start::2] /= found
    after = replace(plain, logits=scaled)
    found = fit_temperature(result.logits, result.labels)
    if found is None or after.loss >= plain.loss:
        return plain.decision
    entry: dict[str, Any] = {"data": data, "images": number}
    for name, measured_on in (("before", plain), ("after", after)):
        entry[f"loss_{name}"] = round(measured_on.loss, 6)
        entry[f"ece_{name}"] = round(measured_on.reliability.error, 6)
    return replace(plain.decision, temperature=found, measured={"temperature": entry})


def with_thresholds(result: Evaluation, data: str) -> Decision:
    """Returns the decision of a result with a threshold per class, for the highest F1 on it.

    Only for several labels per image.
    """
    plain = result.decision
    logits = best_thresholds(result.labels, result.logits) / plain.temperature
    limits = torch.from_numpy(logits).sigmoid().tolist()
    after = replace(result, decision=replace(plain, thresholds=limits))
    entry: dict[str, Any] = {"data": data, "images": len(result.labels)}
    entry |= {"f1_before": round(result.macro_f1, 6), "f1_after": round(after.macro_f1, 6)}
    return replace(after.decision, measured={**plain.measured, "thresholds": entry})


def fitted(result: Evaluation, data: str) -> Decision:
    """Returns the decision of a result with the temperature, and the thresholds per class for
    several labels per image, that suit these held-out images."""
    decision = with_temperature(result, data)
    if not result.is_multi_label:
        return decision
    return with_thresholds(replace(result, decision=decision), data)


def with_threshold(
    result: Evaluation,
    data: str,
    *,
    unsure_below: float | None = None,
    accuracy: float | None = None,
    coverage: float | None = None,
) -> Decision:
    """Returns the decision of a result with a threshold, and what was measured at it.

    Exactly one is given: the threshold; the accuracy of the answers, for the most answers that
    reach it; or the coverage, the smallest fraction of images that are answered.
    """
    given = {"unsure_below": unsure_below, "accuracy": accuracy, "coverage": coverage}
    chosen = {name: value for name, value in given.items() if value is not None}
    for name, value in chosen.items():
        between(name, value, 0, 1)
    if len(chosen) != 1:
        what = f"one of {', '.join(given)} chooses the threshold, got {', '.join(chosen) or 'none'}"
        raise UserError(what, fix="Give exactly one", code="conflict")
    if result.decision.labels != "single":
        what = "with several labels per image every class has a threshold of its own"
        raise UserError(what, where=next(iter(chosen)), code="wrong-type")
    if unsure_below is None:
        unsure_below = _threshold(result, accuracy, coverage)
    decision = replace(result.decision, unsure_below=unsure_below)
    row = coverage_table(result, [unsure_below])[0]
    entry = {"data": data, "images": len(result.labels), **row}
    return replace(decision, measured={**decision.measured, "unsure_below": entry})


def _threshold(result: Evaluation, accuracy: float | None, coverage: float | None) -> float:
    order = np.argsort(-result.confidences, kind="stable")
    confidences, number = result.confidences[order], np.arange(1, len(order) + 1)
    reached = np.cumsum(result.correct[order]) / number
    is_end = np.append(confidences[1:] < confidences[:-1], True)  # equal ones are answered together
    if coverage is not None:
        return float(confidences[is_end & (number / len(order) >= coverage)][0])
    good = is_end if accuracy is None else is_end & (reached >= accuracy)
    if not good.any():
        what = f"no threshold reaches an accuracy of {accuracy:.2%}; the highest reached is "
        what += f"{reached[is_end].max():.2%}"
        raise UserError(what, where="accuracy", fix="A lower one", code="out-of-range")
    return float(confidences[good][-1])


def coverage_table(result: Evaluation, thresholds: Any = THRESHOLDS) -> list[dict[str, Any]]:
    """Returns coverage, and accuracy of what is answered (None without answers), at thresholds."""
    rows = []
    for threshold in thresholds:
        answered = result.confidences >= threshold
        right = result.correct[answered]
        accuracy = float(right.mean()) if answered.any() else None
        row = {"threshold": threshold, "coverage": float(answered.mean()), "accuracy": accuracy}
        rows.append(row)
    return rows


def coverage_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Returns `coverage_table` as text."""
    cells = [
        [
            f"{row['threshold']:.4g}",
            f"{row['coverage']:.2%}",
            "-" if row["accuracy"] is None else f"{row['accuracy']:.2%}",
        ]
        for row in rows
    ]
    return table(["unsure below", "answered", "accuracy of the answers"], cells, left=1)


def summary(decision: Decision) -> list[str]:
    """Returns sentences on what was measured for a decision, for the console and the model card."""
    lines = []
    entry = decision.measured.get("temperature", {})
    if {"images", "ece_before", "ece_after"} <= entry.keys():
        lines.append(
            f"temperature {decision.temperature:.4g}, fitted on {entry['images']:,} images of "
            f"{entry.get('data')}: expected calibration error {entry['ece_before']:.2%} before, "
            f"{entry['ece_after']:.2%} after"
        )
    entry = decision.measured.get("thresholds", {})
    if {"images", "f1_before", "f1_after"} <= entry.keys():
        lines.append(
            f"a threshold per class, chosen on {entry['images']:,} images of {entry.get('data')}: "
            f"macro F1 {entry['f1_before']:.2%} at 0.5, {entry['f1_after']:.2%} with the thresholds"
        )
    entry = decision.measured.get("unsure_below", {})
    if entry.get("accuracy") is not None and {"images", "coverage"} <= entry.keys():
        lines.append(
            f'"unsure" below a probability of {decision.unsure_below:.4g}: {entry["coverage"]:.2%} '
            f"of {entry['images']:,} images of {entry.get('data')} are answered, "
            f"{entry['accuracy']:.2%} of these correctly"
        )
    return lines
