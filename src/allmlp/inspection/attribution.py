"""What one image excites: what token-mixing units read and write, and what a prediction depends on.

Shapes: S patches, G_H G_W their grid, C channels, U units, H W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from allmlp.data.source import ImageFiles
from allmlp.data.transforms import model_input, normalize
from allmlp.errors import UserError
from allmlp.inspection.units import Floats, ModelUnits, TokenMixingLayer, stem_convolution
from allmlp.io import expand
from allmlp.models.inference import evaluating
from allmlp.models.layers import (
    Classifier,
    ImageClassifier,
    check_trained,
    classes_of,
    preprocessing_of,
)
from allmlp.runtime.device import exact_matmuls, step_threads


@dataclass(frozen=True)
class UnitResponse:
    """Response of a token-mixing unit to an image; maps are (G_H, G_W), see `responses_of`."""

    layer: int  # from 1
    unit: int  # from 0
    weights: Floats  # incoming
    read: Floats
    written: Floats | None  # None if the outputs are not on this grid
    strength: float

    def to_json(self) -> dict[str, Any]:
        maps = {"strength": self.strength, "read": self.read, "written": self.written}
        return {"layer": self.layer, "unit": self.unit + 1, **maps}


@dataclass(frozen=True)
class Occlusion:
    """Drop in the probability of the predicted class when parts of the image are covered."""

    label: int  # from 0
    name: str
    probability: float
    drop: Floats  # (rows, columns) of window positions; negative where covering helps
    places: NDArray[np.int64]  # (rows, columns, 2): first patch (down, right) of the window, from 0
    patch_drop: Floats  # (G_H, G_W): mean over the windows that cover the patch
    window: int  # in patches

    @property
    def largest(self) -> tuple[float, int, int]:
        """The largest drop, and row and column of its window's first patch, from 1."""
        at = np.unravel_index(int(self.drop.argmax()), self.drop.shape)
        top, left = self.places[at].tolist()
        return float(self.drop[at]), top + 1, left + 1

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {"class": values.pop("name"), "class_index": values.pop("label"), **values}


def read_image(path: str | Path, model: Classifier) -> tuple[Tensor, NDArray[np.uint8]]:
    """Returns the model input, (1, channels, H, W), and its pixels, (H, W, channels)."""
    place = expand(path)
    data = ImageFiles([str(place)]).read(0)
    return model_input(data, place, preprocessing_of(model))


@torch.inference_mode()
def unit_responses(
    model: ImageClassifier, units: ModelUnits, image: Tensor, layer: int
) -> list[UnitResponse]:
    """Returns how the units of a token-mixing MLP (from 1) respond to a model input,
    the strongest first."""
    chosen = units.layer(layer)
    module = model.get_submodule(chosen.name)
    inputs: list[Tensor] = []  # to the two dense layers: y (1, C, S) and h (1, C, U)
    with contextlib.ExitStack() as stack:
        for name in ("dense_0", "dense_1"):
            dense = module.get_submodule(name)
            hook = dense.register_forward_pre_hook(lambda _, given: inputs.extend(given))
            stack.callback(hook.remove)
        _run(model, image)
    tokens, activation = (value.cpu().double().numpy()[0] for value in inputs)
    if not (np.isfinite(tokens).all() and np.isfinite(activation).all()):
        raise UserError(f"layer {layer} computes values that are not finite", where="the image")
    return responses_of(chosen, tokens, activation)


def responses_of(layer: TokenMixingLayer, tokens: Floats, activation: Floats) -> list[UnitResponse]:
    """Returns the response maps of a layer's units from the normalised tokens y, (C, S), and the
    activations h, (C, U), of an image (docs/inspection.md): the largest norm of `written` first, or
    the greatest strength where no weights go out to a grid.

        read     w[u, s] * sum_c h[c, u] y[c, s], with incoming weights w
        written  |v[s, u]| * strength, with outgoing weights v and strength sqrt(sum_c h[c, u]^2)
    """
    grid = layer.incoming.shape[1:]
    read = layer.incoming * (activation.T @ tokens).reshape(-1, *grid)  # (U, G_H, G_W)
    strength = np.linalg.norm(activation, axis=0)
    written: Any = [None] * len(strength)
    if layer.outgoing is not None:
        written = np.abs(layer.outgoing) * strength[:, None, None]
    columns = zip(layer.incoming, read, written, strength.tolist(), strict=True)
    units = [UnitResponse(layer.number, unit, *values) for unit, values in enumerate(columns)]
    size = [one.strength if one.written is None else np.linalg.norm(one.written) for one in units]
    return sorted(units, key=lambda one: size[one.unit], reverse=True)


def occlusion(
    model: Classifier,
    image: Tensor,
    *,
    batch_size: int = 64,
    on_batch: Callable[[int], object] = lambda count: None,
) -> Occlusion:
    """Returns the drop in predicted probability under a sliding grey window (Zeiler and Fergus
    2014). `on_batch` is called with the number of covered images."""
    window, places, (down, right) = occlusion_places(model)
    whole = _probabilities(model, image)[0]
    label = int(whole.argmax())
    grey = normalize(torch.full(tuple(image[:1].shape), 127.5), preprocessing_of(model))
    grey = grey[0, :, :1, :1].to(image.device)
    parts = []
    for part in torch.from_numpy(places.reshape(-1, 2)).split(batch_size):
        covered = image.repeat(len(part), 1, 1, 1)
        for at, (top, left) in enumerate(part.tolist()):
            y, x = top * down, left * right
            covered[at, :, y : y + window * down, x : x + window * right] = grey
        parts.append(whole[label] - _probabilities(model, covered)[:, label])
        on_batch(len(part))
    drop = np.concatenate(parts).reshape(places.shape[:2])
    total, count = np.zeros((2, image.shape[2] // down, image.shape[3] // right))
    for (top, left), value in zip(places.reshape(-1, 2), drop.ravel(), strict=True):
        total[top : top + window, left : left + window] += value
        count[top : top + window, left : left + window] += 1
    name = classes_of(model, or_numbers=True)[label]
    return Occlusion(label, name, float(whole[label]), drop, places, total / count, window)


def occlusion_places(model: Classifier) -> tuple[int, NDArray[np.int64], tuple[int, int]]:
    """Returns the window's side, a fifth of the grid's shorter side; all window positions (rows,
    columns, 2), a third of that apart, the last ones moved inwards to cover every patch; and
    (height, width) of a patch, one step of the stem."""
    stem = stem_convolution(model) if isinstance(model, ImageClassifier) else None
    grid = getattr(model.config, "grid", None)
    height, width = model.config.image_size
    if stem is not None:
        down, right = int(stem.stride[0]), int(stem.stride[1])
    elif grid is not None:  # exported files have no modules
        down, right = height // grid[0], width // grid[1]
    else:
        raise UserError(f"{type(model).__name__} has no patches that a window could cover")
    rows, columns = height // down, width // right
    window = max(1, round(min(rows, columns) / 5))
    ends = (rows - window, columns - window)
    tops, lefts = (np.unique([*range(0, end, max(1, window // 3)), end]) for end in ends)
    return window, np.stack(np.meshgrid(tops, lefts, indexing="ij"), axis=-1), (down, right)


@torch.inference_mode()
def _probabilities(model: Classifier, images: Tensor) -> Floats:
    check_trained(model)
    probabilities = model.decision.probabilities(_run(model, images).cpu().double()).numpy()
    if not np.isfinite(probabilities).all():
        raise UserError("the probabilities are not finite", where="the image")
    return probabilities


def _run(model: Classifier, images: Tensor) -> Tensor:
    if not isinstance(model, ImageClassifier):
        return model(images)
    threads = step_threads(model.device, model.config.flops * len(images))
    with evaluating(model), threads, exact_matmuls(model.device):
        return model(images.to(model.device))
