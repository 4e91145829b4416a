"""The numbers of a whole model: every token-mixing MLP and the stem, for tables and files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from allmlp.inspection.token_mixing import ModelUnits, model_units
from allmlp.inspection.units import (
    FREQUENCY_EDGES,
    OPPOSITE,
    UnitMeasures,
    measure_units,
)
from allmlp.models.catalog import config_to_json
from allmlp.models.layers import ImageClassifier


@dataclass(frozen=True)
class ModelMeasures:
    """The numbers of a model.

    Attributes:
        name: of the model, for titles and files.
        architecture: as config.json has it.
        units: the weights that were measured.
        incoming: of each drawable layer, in order.
        outgoing: likewise, of the outgoing weights; None for a layer without, empty where they
            were not asked for.
        stem: of the patch embedding, its frequency in cycles per pixel; None where it has none.
    """

    name: str
    architecture: dict[str, Any]
    units: ModelUnits
    incoming: list[UnitMeasures]
    outgoing: list[UnitMeasures | None]
    stem: UnitMeasures | None

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers of every layer as JSON values."""
        layers = []
        for at, layer in enumerate(self.units.layers):
            incoming = self.incoming[at]
            values: dict[str, Any] = {
                "layer": layer.number,
                "module": layer.name,
                "grid": list(incoming.grid),
                "incoming": incoming.to_json(),
            }
            out = self.outgoing[at] if self.outgoing else None
            if self.outgoing:
                values["outgoing"] = None if out is None else out.to_json()
            layers.append(values)
        return {
            "name": self.name,
            "architecture": self.architecture,
            "layers": layers,
            "stem": None if self.stem is None else self.stem.to_json(),
        }

    def unit_rows(self) -> Iterator[list[Any]]:
        """Yields layer, weights, unit, frequency, locality, opposite, correlation of every unit.

        Layers and units count from 1; "" where a unit has no such number.
        """
        for at, layer in enumerate(self.units.layers):
            kinds = [("incoming", self.incoming[at])]
            out = self.outgoing[at] if self.outgoing else None
            if out is not None:
                kinds.append(("outgoing", out))
            for kind, measures in kinds:
                yield from _rows(str(layer.number), kind, measures)
        if self.stem is not None:
            yield from _rows("stem", "incoming", self.stem)


def measure_model(
    model: ImageClassifier, name: str = "model", *, outgoing: bool = False
) -> ModelMeasures:
    """Returns the numbers of every token-mixing MLP of a model and of its stem.

    Args:
        model: of any family; `units.notes` of the result says what does not apply.
        name: for titles and files.
        outgoing: measure the outgoing weights as well.
    """
    units = model_units(model)
    return ModelMeasures(
        name,
        config_to_json(model.config),
        units,
        [measure_units(layer.incoming) for layer in units.layers],
        [
            None if layer.outgoing is None else measure_units(layer.outgoing)
            for layer in (units.layers if outgoing else [])
        ],
        None if units.stem is None else measure_units(units.stem),
    )


def weight_correlations(first: ModelMeasures, second: ModelMeasures) -> dict[str, float]:
    """Returns how alike the weights of two models are: the correlation of all incoming weights.

    By layer, "1", "2", ..., and "stem"; only where both have the same shape. A model and its own
    initial weights begin at 1; unrelated ones are near 0.
    """
    pairs = {"stem": (first.units.stem, second.units.stem)}
    others = {layer.number: layer.incoming for layer in second.units.layers}
    for layer in first.units.layers:
        pairs[str(layer.number)] = (layer.incoming, others.get(layer.number))
    found = {}
    for label, (one, other) in pairs.items():
        if one is None or other is None or one.shape != other.shape:
            continue
        norms = np.linalg.norm(one) * np.linalg.norm(other)
        if norms > 0:
            found[label] = float((one * other).sum() / norms)
    return found


def definitions() -> dict[str, Any]:
    """Returns what the numbers mean, as they stand in inspection.json."""
    return {
        "counting": "layers and units from 1",
        "frequency": (
            "spectral centroid: the mean of |f| over the 2-D Fourier transform of a unit's "
            "weights, weighted with its power; the mean of the weights (f = 0) is kept. Cycles per "
            "patch; of the stem, cycles per pixel, the power summed over the colours"
        ),
        "histogram_edges": [round(float(edge), 3) for edge in FREQUENCY_EDGES],
        "correlation": "u . v / (|u| |v|), the mean not removed",
        "partner_correlation": "of each unit with its most negative other unit of the layer",
        "opposite_share": f"share of units whose partner_correlation is below {OPPOSITE}",
        "weights_correlation": "of all incoming weights of a layer with the compared model's",
        "locality": (
            "share of a unit's energy in the best axis-aligned window of half the height and half "
            "the width, rounded up"
        ),
        "zero_units": "units whose weights are all zero; no other number counts them",
    }


def _rows(layer: str, kind: str, measures: UnitMeasures) -> Iterator[list[Any]]:
    for unit in range(len(measures.frequency)):
        if measures.is_zero[unit]:
            yield [layer, kind, unit + 1, "", "", "", ""]
            continue
        partner = int(measures.partner[unit])
        yield [
            layer,
            kind,
            unit + 1,
            f"{measures.frequency[unit]:.6f}",
            f"{measures.locality[unit]:.6f}",
            partner + 1 if partner >= 0 else "",
            f"{measures.partner_correlation[unit]:.6f}" if partner >= 0 else "",
        ]
