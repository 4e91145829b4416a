"""Whether a model is as sure as it is right: the expected calibration error and its bins.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3, with 15 bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Images by how sure the model was of its answer; B bins of equal width.

    Attributes:
        edges: (B + 1,) from 0 to 1; a bin has the confidences above its lower edge and up to its
            upper one.
        images: int64 (B,), those in each bin.
        confidence: float64 (B,), the sum of their confidences.
        correct: int64 (B,), how many of them were answered rightly.
    """

    edges: np.ndarray
    images: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: mean over all images of |accuracy - confidence| of their
        bins, from 0 to 1."""
        return float(np.abs(self.correct - self.confidence).sum() / self.images.sum())

    def to_json(self) -> list[dict[str, Any]]:
        """Returns a row for each bin; mean confidence and accuracy are None where it is empty."""
        return [
            {
                "above": float(self.edges[at]),
                "up_to": float(self.edges[at + 1]),
                "images": int(self.images[at]),
                "confidence": float(self.confidence[at] / self.images[at])
                if self.images[at]
                else None,
                "accuracy": float(self.correct[at] / self.images[at]) if self.images[at] else None,
            }
            for at in range(len(self.images))
        ]


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> Reliability:
    """Returns the images in bins of equal width, by the confidence of their answers.

    Args:
        confidence: float (N,), the probability of each answer, on [0, 1].
        right: bool (N,), whether it was right.
        bins: how many, at least 1.
    """
    # An edge is rounded as the confidences are: the float32 next to 1/5 lies on the edge at 1/5.
    edges = (np.arange(bins + 1) / bins).astype(confidence.dtype)
    at = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    return Reliability(
        edges,
        np.bincount(at, minlength=bins),
        np.bincount(at, weights=confidence, minlength=bins),
        np.bincount(at[right], minlength=bins),
    )
