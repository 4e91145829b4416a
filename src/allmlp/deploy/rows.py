"""A model and a source of images -> rows, a batch at a time; nothing is kept.

Shapes: N images of a batch, K classes, C features.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from allmlp.data.source import Source
from allmlp.deploy.exported_model import ExportedModel
from allmlp.errors import UserError, at_least
from allmlp.evaluation.predictor import Predictor
from allmlp.models.layers import ImageClassifier, classes_of

NOT_FINITE = "the model's numbers for this image are not finite"


@dataclass(frozen=True)
class Prediction:
    """What the model computes for one image.

    Attributes:
        path: of the image.
        classes: (class name, probability), the most probable first; empty for a bad image.
        error: why the image has no prediction; None for a good one.
        features: float32 (C,), if they were asked for.
    """

    path: str
    classes: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None
    features: np.ndarray | None = field(default=None, compare=False)


Rows = list[Prediction]


@dataclass(frozen=True)
class Columns:
    """What every row holds: the `width` most probable classes, or the features."""

    width: int
    features: bool = False

    @property
    def top_k(self) -> int | None:
        """The number of classes; None for features."""
        return None if self.features else self.width

    def names(self) -> list[str]:
        """Returns the names of the columns of a flat table."""
        if self.features:
            return [f"feature_{number}" for number in range(self.width)]
        ranks = range(1, self.width + 1)
        return [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")]


def choose_columns(
    model: ImageClassifier, *, top_k: int | None = None, features: bool = False
) -> Columns:
    """Returns what the rows of a model hold: top_k classes, at most as many as there are, or 5."""
    at_least("top_k", top_k, 1)
    if not features:
        return Columns(min(top_k or 5, len(classes_of(model, or_numbers=True))))
    if isinstance(model, ExportedModel):
        what = "an exported file gives classes, not features"
        raise UserError(what, where="features", fix="Use the model that it was made from")
    if type(model).features is ImageClassifier.features:
        what = f"the model gives no features: {type(model).__name__} defines no features()"
        raise UserError(what, fix="Give its class a method features(images) -> (N, C)")
    return Columns(model.config.hidden_dim, features=True)


def row_values(
    predictor: Predictor, columns: Columns
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Returns a function from uint8 images (N, channels, H, W) to the numbers of their rows.

    Probabilities in falling order or features, float32 (N, width); classes, int64 (N, width or 0);
    and whether the model's numbers are finite, bool (N,).
    """

    def classes(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = predictor.logits(images)
        # Sorted instead of torch.topk, which may take any of two classes of equal probability.
        ordered, order = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
        width = columns.width
        return ordered[:, :width], order[:, :width], logits.isfinite().all(dim=1)

    def features(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = predictor.features(images)
        if values.shape[1] != columns.width:
            what = f"features() gave {values.shape[1]} numbers per image, not {columns.width}"
            raise UserError(what, where=type(predictor.model).__name__)
        none = torch.empty(len(images), 0, dtype=torch.int64)
        return values, none, values.isfinite().all(dim=1)

    return features if columns.features else classes


def predict_rows(
    predictor: Predictor, source: Source, columns: Columns
) -> Generator[Rows, None, None]:
    """Yields a row for every image, in order, a batch of rows at a time."""
    names = [] if columns.features else classes_of(predictor.model, or_numbers=True)
    for batch in predictor.run(source, row_values(predictor, columns)):
        rows = {image.index: Prediction(image.name, error=image.what) for image in batch.bad}
        numbers = zip(batch.indices.tolist(), *batch.values, strict=bool(batch.values))
        for index, values, order, finite in numbers:
            path = source.item_name(index)
            if not finite:
                rows[index] = Prediction(path, error=NOT_FINITE)
            elif columns.features:
                rows[index] = Prediction(path, features=values)
            else:
                pairs = zip(order.tolist(), values.tolist(), strict=True)
                rows[index] = Prediction(path, [(names[k], value) for k, value in pairs])
        yield [rows[index] for index in sorted(rows)]
