"""Which layers of an int8 file compute in int8: measured on the calibration images.

How much a layer suffers is measured with that layer alone in int8: the root mean square of what it
changes in the logits, relative to that of the logits. The layers that suffer most are the first to
stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from allmlp.deploy.quantize import Product, Ranges, find_products, measure_ranges, quantized
from allmlp.deploy.runner import onnx_session
from allmlp.errors import UserError

# The shares of the images whose activations must be in range whole. A range that leaves out the
# rare extremes is finer for all the rest; which is better is tried.
QUANTILES = (1.0, 0.9, 0.5)
_IMAGES_TO_JUDGE = 64


@dataclass
class Calibration:
    """A float32 graph and what its layers see of the calibration images.

    Attributes:
        graph: in float32.
        products: its dense layers.
        ranges: of their inputs.
        inputs: some calibration images, as inputs of the graph, (n, ...).
        quantile: of `QUANTILES`, that changes the logits least.
        num_images: calibration images.
        num_threads: of the processor.
        errors: what each layer alone changes, by its node; empty until it is asked for.
    """

    graph: Any
    products: list[Product]
    ranges: dict[str, Ranges]
    inputs: np.ndarray
    quantile: float
    num_images: int
    num_threads: int
    errors: dict[str, float]

    def file(self, num_kept: int) -> tuple[Any, list[str]]:
        """Returns the graph in int8 but for so many layers, and their names."""
        kept = self.most_sensitive()[:num_kept] if num_kept else []
        nodes = {each.node for each in kept}
        chosen = [each for each in self.products if each.node not in nodes]
        return quantized(self.graph, chosen, self.ranges, self.quantile), [e.layer for e in kept]

    def most_sensitive(self) -> list[Product]:
        """Returns the layers, the one that suffers most first."""
        if not self.errors:
            exact = self._logits(self.graph)
            for each in self.products:
                graph = quantized(self.graph, [each], self.ranges, self.quantile)
                self.errors[each.node] = _relative(self._logits(graph), exact)
        return sorted(self.products, key=lambda each: -self.errors[each.node])

    def choose_quantile(self) -> None:
        """Takes the range of activations that changes the logits least."""
        exact = self._logits(self.graph)
        found = {
            each: _relative(
                self._logits(quantized(self.graph, self.products, self.ranges, each)), exact
            )
            for each in QUANTILES
        }
        self.quantile = min(found, key=lambda each: found[each])

    def _logits(self, graph: Any) -> np.ndarray:
        session = onnx_session(graph.SerializeToString(), self.num_threads)
        batches = (self.inputs[at : at + 8] for at in range(0, len(self.inputs), 8))
        return np.concatenate([session.run(None, {"images": batch})[0] for batch in batches])


def calibrate(
    graph: Any, batches: Callable[[], Any], num_threads: int, summary: str
) -> Calibration:
    """Returns the ranges that a graph's layers have on the calibration images.

    Args:
        graph: in float32.
        batches: gives the images, as inputs of the graph.
        num_threads: of the processor.
        summary: of the model, for the error.

    Raises:
        UserError: no layer can be in int8, or no image is there.
    """
    products = find_products(graph)
    if len(products) < 2:  # the head alone is nothing
        what = f"int8 is for dense layers, and this model has next to none: {summary}"
        raise UserError(what, where="--precision", fix="--precision float32")
    first: list[np.ndarray] = []
    seen = 0

    def watched() -> Any:
        nonlocal seen
        for batch in batches():
            if seen < _IMAGES_TO_JUDGE:
                first.append(batch[: _IMAGES_TO_JUDGE - seen])
            seen += len(batch)
            yield batch

    ranges = measure_ranges(graph, products, watched(), num_threads)
    made = Calibration(graph, products, ranges, np.concatenate(first), 1.0, seen, num_threads, {})
    made.choose_quantile()
    return made


def _relative(logits: np.ndarray, exact: np.ndarray) -> float:
    """The root mean square of the difference, relative to that of the logits about their mean."""
    spread = exact - exact.mean(axis=1, keepdims=True)
    size = float(np.sqrt((spread**2).mean()))
    error = float(np.sqrt(((logits - exact) ** 2).mean()))
    return error / size if size else error
