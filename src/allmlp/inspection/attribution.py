"""What one image excites: what token-mixing units read and write, and what a prediction rests on.

Legend: S patches, G_H G_W their grid, C channels, U units, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from allmlp.data.image import EncodedImage
from allmlp.data.permutation import permute
from allmlp.data.transforms import normalize, resize_for_evaluation
from allmlp.errors import UserError, between
from allmlp.inspection.token_mixing import (
    ModelUnits,
    TokenMixingLayer,
    patch_grid,
    stem_convolution,
)
from allmlp.inspection.units import Floats
from allmlp.io import expand
from allmlp.models.inference import evaluating
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.runtime.device import step_threads


@dataclass(frozen=True)
class UnitResponse:
    """What one token-mixing unit does to one image; maps are (G_H, G_W), see `responses_of`."""

    layer: int  # from 1
    unit: int  # from 0
    weights: Floats  # incoming
    read: Floats
    written: Floats | None  # None where the layer does not write to such a grid
    strength: float

    def to_json(self) -> dict[str, Any]:
        """Returns the maps as JSON values; layer and unit count from 1."""
        written = None if self.written is None else self.written.tolist()
        maps = {"strength": self.strength, "read": self.read.tolist(), "written": written}
        return {"layer": self.layer, "unit": self.unit + 1, **maps}


@dataclass(frozen=True)
class Occlusion:
    """How the probability of the predicted class drops where the image is covered."""

    label: int  # from 0
    name: str
    probability: float
    drop: Floats  # (rows, columns) of the window's positions; negative where covering helps
    places: NDArray[np.int64]  # (rows, columns, 2) the window's first patch (down, right)
    patch_drop: Floats  # (G_H, G_W) the mean over the windows that cover the patch
    window: int  # patches
    stride: int

    def to_json(self) -> dict[str, Any]:
        """Returns the map as JSON values; patches count from 0."""
        return {
            "class": self.name,
            "class_index": self.label,
            "probability": self.probability,
            "window": self.window,
            "stride": self.stride,
            "places": self.places.tolist(),
            "drop": self.drop.tolist(),
            "patch_drop": self.patch_drop.tolist(),
        }


def read_image(path: str | Path, model: ImageClassifier) -> tuple[Tensor, NDArray[np.uint8]]:
    """Returns the input of the model, (1, channels, H, W), and its pixels (H, W, channels)."""
    place = expand(path)
    try:
        data = place.read_bytes()
    except OSError as error:
        what = f"cannot read the image: {error.strerror}"
        raise UserError(what, where=place, fix="Give an image file") from error
    return decode_image(data, place, model)


def decode_image(
    data: bytes, where: object, model: ImageClassifier
) -> tuple[Tensor, NDArray[np.uint8]]:
    """Returns what `read_image` does, from an encoded file in memory; `where` names it."""
    rules = preprocessing_of(model)
    image = EncodedImage(data, where, rules.channels, exif_orientation=rules.exif_orientation)
    pixels = resize_for_evaluation(image.decode(), rules)
    raw = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
    if rules.permutation != "none":  # shown as the model sees it
        pixels = permute(raw, rules)[0].movedim(0, 2).numpy()
    return normalize(raw, rules), pixels


@torch.inference_mode()
def unit_responses(
    model: ImageClassifier, units: ModelUnits, image: Tensor, layer: int
) -> list[UnitResponse]:
    """Returns what every unit of a token-mixing MLP (from 1) does to the model's input."""
    chosen = units.layer(layer)
    module = model.get_submodule(chosen.name)
    inputs: list[Tensor] = []  # of the two dense layers: y (1, C, S) and h (1, C, U)
    hooks = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, given: inputs.extend(given))
        for name in ("dense_0", "dense_1")
    ]
    try:
        _run(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    tokens, activation = (value.double().cpu().numpy()[0] for value in inputs)
    if not (np.isfinite(tokens).all() and np.isfinite(activation).all()):
        raise UserError(f"layer {layer} computes values that are not finite", where="the image")
    return responses_of(chosen, tokens, activation)


def responses_of(layer: TokenMixingLayer, tokens: Floats, activation: Floats) -> list[UnitResponse]:
    """Returns the response maps of a layer's units, from what the layer computes for an image.

    Unit u has in channel c the pre-activation a[c] = sum_s w[u, s] y[c, s] + b[u] and the
    activation h[c] = GELU(a[c]). For each patch s:

        read     w[u, s] * sum_c h[c] y[c, s]: the patch's part of the response, positive where it
                 excites the unit. Over all patches they add up to sum_c h[c] (a[c] - b[u]).
        written  |v[s, u]| * strength, with v the outgoing weights and strength sqrt(sum_c h[c]^2):
                 the norm, over channels, of what the unit adds to the token.

    Args:
        tokens: y, (C, S), the normalised tokens.
        activation: h, (C, U).
    """
    grid = layer.incoming.shape[1:]
    read = layer.incoming * (activation.T @ tokens).reshape(-1, *grid)  # (U, G_H, G_W)
    strength = np.sqrt((activation**2).sum(axis=0))
    written = None
    if layer.outgoing is not None:
        written = np.abs(layer.outgoing) * strength[:, None, None]
    return [
        UnitResponse(
            layer.number,
            unit,
            layer.incoming[unit],
            read[unit],
            None if written is None else written[unit],
            float(strength[unit]),
        )
        for unit in range(len(strength))
    ]


def strongest(responses: Sequence[UnitResponse], most: int) -> list[UnitResponse]:
    """Returns the units that add most to the tokens: by the energy of `written`, largest first."""
    sizes = [
        response.strength if response.written is None else np.sqrt((response.written**2).sum())
        for response in responses
    ]
    order = np.argsort(-np.array(sizes), kind="stable")[:most]
    return [responses[at] for at in order]


def occlusion(
    model: ImageClassifier,
    image: Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], object] = lambda count: None,
) -> Occlusion:
    """Returns where the predicted probability drops under a sliding window of grey patches.

    Zeiler and Fergus 2014. The windows of the last row and column are moved inwards where the
    stride would leave patches uncovered. `on_batch` is called with the number of covered images.
    """
    window, stride, places = occlusion_places(model, window, stride)
    rows, columns, (down, right) = _occlusion_grid(model)
    whole = _probabilities(model, image)[0]
    label = int(whole.argmax())
    rules = preprocessing_of(model)
    grey = normalize(torch.full(tuple(image[:1].shape), 127.5), rules)[..., :1, :1]
    grey = grey.to(image.device)
    flat = places.reshape(-1, 2)
    parts = []
    for start in range(0, len(flat), batch_size):
        part = flat[start : start + batch_size]
        covered = image.repeat(len(part), 1, 1, 1)
        for at, (top, left) in enumerate(part):
            y, x = top * down, left * right
            covered[at, :, y : y + window * down, x : x + window * right] = grey[0]
        parts.append(whole[label] - _probabilities(model, covered)[:, label])
        on_batch(len(part))
    drop = np.concatenate(parts).reshape(places.shape[:2])
    total, count = np.zeros((rows, columns)), np.zeros((rows, columns))
    for (top, left), value in zip(flat, drop.ravel(), strict=True):
        total[top : top + window, left : left + window] += value
        count[top : top + window, left : left + window] += 1
    name = model.class_names[label] if model.class_names else f"class {label}"
    return Occlusion(label, name, float(whole[label]), drop, places, total / count, window, stride)


def _occlusion_grid(model: ImageClassifier) -> tuple[int, int, tuple[int, int]]:
    """Patches in a column, in a row, and the (height, width) of one (one step of the stem)."""
    stem, grid = stem_convolution(model), patch_grid(model)
    height, width = model.config.image_size
    if stem is not None:
        down, right = int(stem.stride[0]), int(stem.stride[1])
    elif grid is not None:  # an exported file has no modules
        down, right = height // grid[0], width // grid[1]
    else:
        raise UserError(f"{type(model).__name__} has no patches that a window could cover")
    return height // down, width // right, (down, right)


def occlusion_places(
    model: ImageClassifier, window: int | None = None, stride: int | None = None
) -> tuple[int, int, NDArray[np.int64]]:
    """Returns the window's side, the stride, and all positions of the window (rows, columns, 2).

    By default the side is a fifth of the grid's shorter side, and the stride a third of that.
    """
    rows, columns, _ = _occlusion_grid(model)
    most = min(rows, columns)
    window = max(1, round(most / 5)) if window is None else window
    between("window", window, 1, most)
    stride = max(1, window // 3) if stride is None else stride
    between("stride", stride, 1, window)  # so that no patch is left out
    tops, lefts = _starts(rows, window, stride), _starts(columns, window, stride)
    return window, stride, np.stack(np.meshgrid(tops, lefts, indexing="ij"), axis=-1)


def _starts(patches: int, window: int, stride: int) -> NDArray[np.int64]:
    last = patches - window
    return np.unique([*range(0, last + 1, stride), last]).astype(np.int64)


@torch.inference_mode()
def _probabilities(model: ImageClassifier, images: Tensor) -> Floats:
    weight = getattr(getattr(model, "head", None), "weight", None)
    is_new = weight is not None and not bool(weight.any())
    if model.config.num_classes == 0 or is_new:
        what = "a new head, all zeros" if is_new else "no head"
        raise UserError(f"the model has {what}: it predicts no class", fix="Use trained weights")
    probabilities = _run(model, images).double().softmax(dim=1).cpu().numpy()
    if not np.isfinite(probabilities).all():
        raise UserError("the probabilities are not finite", where="the image")
    return probabilities


def _run(model: ImageClassifier, images: Tensor) -> Tensor:
    device = next(model.parameters()).device
    with evaluating(model), step_threads(device, model.config.flops * len(images)):
        return model(images.to(device))
