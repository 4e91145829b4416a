"""Decision: from logits to probabilities and answers. It is stored with the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from allmlp.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

UNSURE = "unsure"  # the answer below the threshold


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How logits become probabilities and answers, the same in predict, evaluate, serve and export.

    Args:
        labels: "single", one class per image, by a softmax; "multi", any number of classes, by a
            sigmoid each.
        temperature: divides the logits; above 1 the probabilities are less extreme. Fitted on
            held-out images (Guo et al. 2017).
        unsure_below: with single labels, the answer is "unsure" if the highest probability is
            lower; None: never.
        thresholds: with multi labels, the lowest probability of each class that is an answer; None
            is 0.5 for all.
        measured: how the fields above were chosen: field -> {"data": ..., "images": ..., ...}.

    Raises:
        ValueError: a value is out of range.
    """

    labels: Literal["single", "multi"] = "single"
    temperature: float = 1.0
    unsure_below: float | None = None
    thresholds: tuple[float, ...] | None = None
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.labels not in ("single", "multi"):
            raise ValueError(f"labels must be single or multi, got {self.labels!r}")
        if not (_is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}")
        if self.thresholds is not None:
            object.__setattr__(self, "thresholds", tuple(self.thresholds))
        for name in ("unsure_below", "thresholds"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(_is_number(number) and 0 <= number <= 1 for number in numbers):
                raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
            owner = "single" if name == "unsure_below" else "multi"
            if value is not None and self.labels != owner:
                raise ValueError(f"{name} goes with labels={owner!r}")
        known = [found.name for found in fields(self)][:-1]
        is_table = isinstance(self.measured, dict) and all(
            name in known and isinstance(entry, dict) for name, entry in self.measured.items()
        )
        if not is_table:
            raise ValueError(f"measured must be an object per field, got {self.measured!r}")

    @property
    def has_answer(self) -> bool:
        """Whether the answer can differ from the most probable class."""
        return self.labels == "multi" or self.unsure_below is not None

    def with_threshold(self, unsure_below: float | None) -> Decision:
        """Returns the decision with another threshold for "unsure"; None keeps its own."""
        if unsure_below is None:
            return self
        measured = {name: entry for name, entry in self.measured.items() if name != "unsure_below"}
        try:
            return replace(self, unsure_below=unsure_below, measured=measured)
        except ValueError as error:
            raise UserError(str(error), where="unsure_below", code="out-of-range") from error

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the probabilities (N, K) of logits (N, K)."""
        scaled = logits if self.temperature == 1.0 else logits / self.temperature
        return scaled.softmax(dim=1) if self.labels == "single" else scaled.sigmoid()

    def answers(self, probabilities: Tensor) -> Tensor:
        """Returns whether each class is an answer, bool (N, K), by the probabilities (N, K).

        With single labels at most one class of a row is, and none if the model is unsure.
        """
        if self.labels == "multi":
            limits = self.thresholds or (0.5,) * probabilities.shape[1]
            return probabilities >= probabilities.new_tensor(limits)
        highest, first = probabilities.max(dim=1, keepdim=True)
        chosen = probabilities.new_zeros(probabilities.shape).scatter(1, first, 1.0) > 0
        return chosen & (highest >= (self.unsure_below or 0.0))

    def text(self, classes: Sequence[str]) -> str:
        """Returns an answer as text: the class, "unsure", or with multi labels "a|b"."""
        return "|".join(classes) or (UNSURE if self.labels == "single" else "")

    def check_classes(self, number: int) -> None:
        """Raises ValueError if the thresholds are of another number of classes."""
        if self.thresholds is not None and len(self.thresholds) != number:
            raise ValueError(f"{len(self.thresholds):,} thresholds for {number:,} classes")

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that differ from the defaults, as JSON values; {} if none does."""
        values = {found.name: getattr(self, found.name) for found in fields(self)}
        default = vars(Decision())
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value != default[name]
        }

    @staticmethod
    def from_json(values: dict[str, Any] | None, num_classes: int) -> Decision:
        """Inverse of `to_json`; None, as in older files, gives the defaults."""
        try:
            found = Decision(**(values or {}))
            found.check_classes(num_classes)
            return found
        except (TypeError, ValueError) as error:
            raise UserError(f"not a decision: {str(values)[:200]} ({error})") from error


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
