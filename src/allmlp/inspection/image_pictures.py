"""Pictures of what one image excites: the occlusion map, and units' response maps beside it.

Legend: G_H G_W patches in a column and in a row, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from allmlp.inspection.attribution import Occlusion, UnitResponse
from allmlp.inspection.pictures import DIVERGING, as_drawn
from allmlp.inspection.units import Floats

_SEQUENTIAL = "viridis"
_DARKEST = 0.6  # of a colour's brightness where the image beneath it is black


def occlusion_figure(pixels: NDArray[np.uint8], result: Occlusion, title: str = "") -> Figure:
    """Returns the image as the model saw it, and the drop of its class's probability over it.

    Args:
        pixels: (H, W, 1 or 3), by `read_image`.
        result: by `occlusion`.
        title: above all, such as the name of the file.
    """
    drop = 100 * result.patch_drop
    largest = max(float(np.abs(drop).max()), 1e-6)
    ratio = min(max(pixels.shape[0] / pixels.shape[1], 0.4), 2.5)
    figure = Figure(figsize=(7.2, 2.05 * ratio + 0.7), layout="constrained")
    if title:
        figure.suptitle(as_drawn(title), fontsize=8, fontweight="bold")
    whole, under, alone = figure.subplots(1, 3)
    _picture(whole, pixels)
    whole.set_title(as_drawn(f"predicted: {result.name}, {result.probability:.1%}"), fontsize=7)
    _picture(under, blend(pixels, drop, largest))
    side = f"{result.window}x{result.window} patches, stride {result.stride}"
    under.set_title(f"covered by a grey window of\n{side}", fontsize=7)
    map_of_patches = alone.imshow(
        drop,
        cmap=DIVERGING,
        vmin=-largest,
        vmax=largest,
        interpolation="nearest",
        extent=(0, pixels.shape[1], pixels.shape[0], 0),
    )
    alone.set_xticks([])
    alone.set_yticks([])
    alone.set_title("mean over the windows\nthat cover a patch", fontsize=7)
    bar = figure.colorbar(map_of_patches, ax=alone, shrink=0.82, pad=0.04)
    bar.set_label(as_drawn(f"drop of p({result.name}), points"), fontsize=6.5)
    bar.ax.tick_params(labelsize=6)
    return figure


def response_figure(
    pixels: NDArray[np.uint8], responses: Sequence[UnitResponse], title: str
) -> Figure:
    """Returns for each unit its weights, where it read and where it wrote, beside the image.

    Args:
        pixels: (H, W, 1 or 3), by `read_image`.
        responses: of one or more layers.
        title: above all.
    """
    layers = sorted({each.layer for each in responses})
    by_layer = [[each for each in responses if each.layer == layer] for layer in layers]
    rows = max(map(len, by_layer))
    cell = 0.72
    ratio = min(max(pixels.shape[0] / pixels.shape[1], 0.4), 2.5)
    size = (1.4 + len(layers) * (3 * cell + 0.5), rows * (cell * ratio + 0.16) + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(as_drawn(title), fontsize=9, fontweight="bold")
    widths = [1.2, *[3 * cell + 0.5] * len(layers)]
    parts = list(np.ravel(np.array(figure.subfigures(1, len(widths), width_ratios=widths))))
    axes = parts[0].subplots()
    _picture(axes, pixels)
    axes.set_title("the image", fontsize=7)
    axes.set_anchor("N")
    for part, layer, units in zip(parts[1:], layers, by_layer, strict=True):
        part.suptitle(f"layer {layer}", fontsize=8)
        grid = part.subplots(rows, 3, squeeze=False)
        for row in range(rows):
            if row >= len(units):
                for axes in grid[row]:
                    axes.set_axis_off()
                continue
            _response(grid[row], units[row], pixels, is_first=row == 0)
    foot = (
        "Weights, read: red positive, blue negative, symmetric about 0. Written: from 0 (dark) to "
        "the largest (yellow). Each picture has its own scale."
    )
    figure.supxlabel(foot, fontsize=6)
    return figure


def _response(
    panels: Sequence[Axes], unit: UnitResponse, pixels: NDArray[np.uint8], *, is_first: bool
) -> None:
    weights, read, written = panels
    scale = max(float(np.abs(unit.weights).max()), 1e-30)
    weights.imshow(
        unit.weights,
        cmap=DIVERGING,
        vmin=-scale,
        vmax=scale,
        interpolation="nearest",
        extent=(0, pixels.shape[1], pixels.shape[0], 0),
    )
    _picture(read, blend(pixels, unit.read, max(float(np.abs(unit.read).max()), 1e-30)))
    if unit.written is None:
        written.set_axis_off()
    else:
        largest = max(float(unit.written.max()), 1e-30)
        written.imshow(
            unit.written,
            cmap=_SEQUENTIAL,
            vmin=0,
            vmax=largest,
            interpolation="nearest",
            extent=(0, pixels.shape[1], pixels.shape[0], 0),
        )
    weights.set_ylabel(f"unit {unit.unit + 1}", fontsize=6.5)
    for axes, name in zip(panels, ("weights", "read", "written"), strict=True):
        axes.set_xticks([])
        axes.set_yticks([])
        if is_first:
            axes.set_title(name, fontsize=7)


def blend(pixels: NDArray[np.uint8], values: Floats, largest: float) -> NDArray[np.float64]:
    """Returns the colours of a map of patches, (H, W, 3) on [0, 1], shaded by the image.

    Args:
        pixels: (H, W, 1 or 3).
        values: (G_H, G_W), drawn from -largest to largest.
        largest: above 0.
    """
    height, width = pixels.shape[:2]
    down = np.minimum(np.arange(height) * values.shape[0] // height, values.shape[0] - 1)
    right = np.minimum(np.arange(width) * values.shape[1] // width, values.shape[1] - 1)
    spread = values[down][:, right]
    colors = matplotlib.colormaps[DIVERGING](0.5 + spread / (2 * largest))[..., :3]
    grey = pixels.mean(axis=2, keepdims=True) / 255.0
    return colors * (_DARKEST + (1 - _DARKEST) * grey)


def _picture(axes: Axes, pixels: NDArray[np.generic]) -> None:
    shown = pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels
    axes.imshow(shown, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
