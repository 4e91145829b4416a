"""What one image excites: where token-mixing units read and write, and what the class hangs on.

Response maps. A token-mixing MLP reads y (C, S), the normalised tokens of one image, and its unit u
has in channel c the drive a[c] = sum_s w[u, s] y[c, s] + b[u] and the activation h[c] = GELU(a[c]).
For each patch s:

    read     r[s] = w[u, s] * sum_c h[c] y[c, s]
             The share of the patch in the response: sum_s r[s] = sum_c h[c] (a[c] - b[u]), exactly.
             Signed: positive where the patch drives the unit to what it says, negative where it
             holds it back.
    written  e[s] = |v[s, u]| * sqrt(sum_c h[c]^2), v the outgoing weights
             The size (Euclidean, over channels) of what the unit adds to the patch's token. Its
             shape over the patches is that of |v| whatever the image: every channel is mixed by
             the same v. The image decides how strong it is.

Occlusion. A window of grey patches slides over the image; where it covers a patch, the probability
of the predicted class drops. Zeiler and Fergus 2014.

Legend: N batch, S patches, G_H G_W their grid, C channels, U units, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from allmlp.data.image import EncodedImage
from allmlp.data.permutation import permute
from allmlp.data.transforms import normalize, resize_for_evaluation
from allmlp.errors import UserError
from allmlp.inspection.token_mixing import (
    ModelUnits,
    TokenMixingLayer,
    patch_grid,
    stem_convolution,
)
from allmlp.io import expand
from allmlp.models.inference import evaluating
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.runtime.device import step_threads

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class UnitResponse:
    """What one token-mixing unit does to one image.

    Attributes:
        layer: number, from 1.
        unit: number, from 0.
        weights: (G_H, G_W) the unit's incoming weights.
        read: (G_H, G_W) signed, as the module says.
        written: (G_H, G_W) not negative; None where the layer writes no such grid.
        strength: sqrt(sum_c h[c]^2), how strongly the image excites the unit.
    """

    layer: int
    unit: int
    weights: Floats
    read: Floats
    written: Floats | None
    strength: float


@dataclass(frozen=True)
class Occlusion:
    """How the probability of a class drops where the image is covered.

    Attributes:
        label: the class, from 0.
        name: of the class; "class 3" where the model carries no names.
        probability: of it, of the whole image.
        drop: (rows, columns) the drop of the probability for each place of the window; negative
            where covering helps.
        places: (rows, columns, 2) the window's first patch (down, right) at each place.
        patch_drop: (G_H, G_W) the mean drop over the windows that cover the patch.
        window, stride: in patches.
    """

    label: int
    name: str
    probability: float
    drop: Floats
    places: NDArray[np.int64]
    patch_drop: Floats
    window: int
    stride: int


def read_image(path: str | Path, model: ImageClassifier) -> tuple[Tensor, NDArray[np.uint8]]:
    """Returns the image as the model sees it: its input (1, channels, H, W), and its pixels.

    Args:
        path: an image file.
        model: whose preprocessing is used.

    Raises:
        UserError: no such file, or it cannot be decoded.
    """
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
    """Returns what `read_image` does, of an encoded file that is at hand.

    Args:
        data: the encoded file.
        where: its name, for the error.
        model: whose preprocessing is used.

    Raises:
        UserError: it cannot be decoded.
    """
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
    """Returns what every unit of one token-mixing MLP does to the image, in the units' order.

    Args:
        model: in any mode; it is run in evaluation mode.
        units: of this model, by `model_units`.
        image: (1, channels, H, W), the model's input.
        layer: number, from 1.

    Raises:
        UserError: no such layer, its units are no pictures, or values that are not finite.
    """
    chosen = units.layer(layer)
    module = model.get_submodule(chosen.name)
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen["tokens"] = given[0]

    def keep_active(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen["activation"] = given[0]

    hooks = [
        module.get_submodule("dense_0").register_forward_pre_hook(keep),
        module.get_submodule("dense_1").register_forward_pre_hook(keep_active),
    ]
    try:
        _run(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = seen["tokens"].double().cpu().numpy()[0]  # (C, S)
    activation = seen["activation"].double().cpu().numpy()[0]  # (C, U)
    if not (np.isfinite(tokens).all() and np.isfinite(activation).all()):
        raise UserError(f"layer {layer} gives values that are not finite", where="the image")
    return responses_of(chosen, tokens, activation)


def responses_of(layer: TokenMixingLayer, tokens: Floats, activation: Floats) -> list[UnitResponse]:
    """Returns the response maps of a layer's units, from what it read and what its units said.

    Args:
        layer: its weights.
        tokens: y, (C, S).
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
        np.sqrt((each.written**2).sum()) if each.written is not None else each.strength
        for each in responses
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
    on_batch: Callable[[int], None] | None = None,
) -> Occlusion:
    """Returns where the probability of the predicted class drops when the image is covered.

    The covering is middle grey, 0.5 on pixel values of [0, 1]. The windows of the last row and
    column are moved inwards where the stride would leave patches uncovered.

    Args:
        model: with a head; class names are not needed.
        image: (1, channels, H, W), the model's input.
        window: side of the window in patches; None takes a fifth of the shorter side, rounded.
        stride: patches between two places, at most the window; None takes a third of it, rounded
            down, and at least 1.
        batch_size: covered images a batch.
        on_batch: called with the number of covered images of every batch once it is done.

    Raises:
        UserError: the window does not fit, the model has no head or a new one, or its
            probabilities are not finite.
    """
    window, stride, places = occlusion_places(model, window, stride)
    rows, columns, (down, right) = occlusion_grid(model)
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
        if on_batch is not None:
            on_batch(len(part))
    drop = np.concatenate(parts).reshape(places.shape[:2])
    total, count = np.zeros((rows, columns)), np.zeros((rows, columns))
    for (top, left), value in zip(flat, drop.ravel(), strict=True):
        total[top : top + window, left : left + window] += value
        count[top : top + window, left : left + window] += 1
    name = model.class_names[label] if model.class_names else f"class {label}"
    return Occlusion(label, name, float(whole[label]), drop, places, total / count, window, stride)


def occlusion_grid(model: ImageClassifier) -> tuple[int, int, tuple[int, int]]:
    """Returns patches in a column, in a row, and the (height, width) of one in pixels.

    Of a model whose stem's patches overlap, it is the step of the stem.

    Raises:
        UserError: the model has neither a stem nor a grid to tell.
    """
    stem, grid = stem_convolution(model), patch_grid(model)
    height, width = model.config.image_size
    if stem is not None:
        down, right = int(stem.stride[0]), int(stem.stride[1])
    elif grid is not None:  # an exported file has no modules to ask
        down, right = height // grid[0], width // grid[1]
    else:
        raise UserError(f"{type(model).__name__} has no patches that a window could cover")
    return height // down, width // right, (down, right)


def occlusion_places(
    model: ImageClassifier, window: int | None = None, stride: int | None = None
) -> tuple[int, int, NDArray[np.int64]]:
    """Returns the window's side, the stride and all places of the window, (rows, columns, 2).

    Args:
        model: whose patches are covered.
        window, stride: as `occlusion`.

    Raises:
        UserError: the window does not fit the grid, or the stride the window.
    """
    rows, columns, _ = occlusion_grid(model)
    most = min(rows, columns)
    if window is None:
        window = max(1, round(most / 5))
    if not 1 <= window <= most:
        what = f"a window of {window} patches does not fit the grid of {rows}x{columns}"
        raise UserError(what, where="--window", fix=f"1 to {most}")
    stride = max(1, window // 3) if stride is None else stride
    if not 1 <= stride <= window:
        what = f"a stride of {stride} patches does not go with a window of {window}"
        raise UserError(what, where="--stride", fix=f"1 to {window}, so that no patch is left out")
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
        what = "a new head, all zeros: no class" if is_new else "no head: there is no class"
        raise UserError(
            f"the model has {what} whose probability could drop", fix="Use trained weights"
        )
    probabilities = _run(model, images).double().softmax(dim=1).cpu().numpy()
    if not np.isfinite(probabilities).all():
        raise UserError("the model gives probabilities that are not finite", where="the image")
    return probabilities


def _run(model: ImageClassifier, images: Tensor) -> Tensor:
    device = next(model.parameters()).device
    with evaluating(model), step_threads(device, model.config.flops * len(images)):
        return model(images.to(device))
