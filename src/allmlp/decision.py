"""Decision: from logits to probabilities and answers. It is stored with the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from allmlp.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

UNSURE = "unsure"  # the answer below the threshold
_Probability = Annotated[float, Field(strict=True, ge=0, le=1)]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How logits become probabilities and answers, the same in predict, evaluate, serve and export.

    Raises:
        ValueError: a value is out of range.
    """

    labels: Literal["single", "multi"] = "single"
    """"single": one class per image, by a softmax; "multi": any number of them, a sigmoid each."""
    temperature: _Positive = 1.0
    """Divides the logits; above 1 the probabilities are less extreme. Fitted on held-out images
    (Guo et al. 2017)."""
    unsure_below: _Probability | None = None
    """With single labels, the answer is "unsure" if the highest probability is lower; None:
    never."""
    thresholds: tuple[_Probability, ...] | None = None
    """With multi labels, the lowest probability of each class that is an answer; None is 0.5 for
    all."""
    measured: dict[Literal["temperature", "unsure_below", "thresholds"], dict[str, Any]] = field(
        default_factory=dict
    )
    """How the fields above were chosen: field -> {"data": ..., "images": ..., ...}."""

    def __post_init__(self) -> None:
        if (self.thresholds if self.labels == "single" else self.unsure_below) is not None:
            raise ValueError("unsure_below goes with single labels, thresholds with multi labels")

    @property
    def has_answer(self) -> bool:
        """Whether the answer can differ from the most probable class."""
        return self.labels == "multi" or self.unsure_below is not None

    def with_threshold(self, unsure_below: float | None) -> Decision:
        """Returns the decision with another threshold for "unsure"; None keeps its own."""
        if unsure_below is None:
            return self
        if self.labels == "multi":
            what = "with several labels per image every class has a threshold of its own"
            raise UserError(what, where="unsure_below", code="wrong-type")
        measured = {name: entry for name, entry in self.measured.items() if name != "unsure_below"}
        return replace(self, unsure_below=unsure_below, measured=measured)

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

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that differ from the defaults, as JSON values; {} if none does."""
        default = asdict(Decision())
        values = {name: value for name, value in asdict(self).items() if value != default[name]}
        return values | ({"thresholds": list(self.thresholds)} if self.thresholds else {})

    @staticmethod
    def from_json(values: dict[str, Any] | None, num_classes: int) -> Decision:
        """Inverse of `to_json`; None, as in older files, gives the defaults."""
        try:
            found = Decision(**(values or {}))
            number = num_classes if found.thresholds is None else len(found.thresholds)
            if number != num_classes:
                raise ValueError(f"{number:,} thresholds for {num_classes:,} classes")
            return found
        except (TypeError, ValueError) as error:
            raise UserError(f"not a decision: {str(values)[:200]} ({error})") from error
