"""Figures 5, 6 and 7 of the paper, and what one image excites: every weight is a square of whole
pixels, in PNG and vector files alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from allmlp.inspection.attribution import Occlusion, UnitResponse
from allmlp.inspection.units import (
    Floats,
    ModelUnits,
    TokenMixingLayer,
    correlations,
    pair_opposites,
)
from allmlp.plots import escape, new_figure, shorten, show

Pixels = NDArray[np.uint8]
Panel = tuple[str, list[Pixels], list[str]]  # title; cells of equal size; a caption below each

DPI = 300
DIVERGING, SEQUENTIAL = "RdBu_r", "viridis"
_FIRST, _PAIRS, _NARROW, _WIDE = 3, 32, 4, 10  # layers and pairs in figure 5; columns of pairs
_DARKEST = 0.6  # brightness of a map where the underlying image is black
_MINUS = "\N{MINUS SIGN}"
# Sizes in pixels at `DPI`.
_UNIT, _STEM_UNIT, _GAP, _MARGIN, _LINE, _PAGE = 80, 64, 6, 24, 40, 1000
_CAPTION = (190, 34)  # "1023   -0.99   1024"


def unit_pixels(unit: Floats) -> Pixels:
    """Returns weights (G_H, G_W) as colours (G_H, G_W, 3), symmetric about zero."""
    return (matplotlib.colormaps[DIVERGING](_scaled(unit))[..., :3] * 255).round().astype(np.uint8)


def color_pixels(unit: Floats) -> Pixels:
    """Returns weights (P, P, 1 or 3) as colours (P, P, 3); grey is zero."""
    return np.repeat((_scaled(unit) * 255).round().astype(np.uint8), 3 // unit.shape[2], axis=2)


def _scaled(unit: Floats) -> Floats:
    largest = float(np.abs(unit).max())
    return 0.5 + unit / (2 * largest) if largest > 0 else np.full(unit.shape, 0.5)


def _enlarged(pixels: Pixels, side: int) -> Pixels:
    """Enlarges pixels to squares, up to about `side` pixels in total, with a thin frame; those of a
    sequence to a band."""
    factor = max(1, round(side / max(pixels.shape[:2])))
    tall = max(factor, side // 4) if len(pixels) == 1 else factor
    pixels = pixels.repeat(tall, axis=0).repeat(factor, axis=1)
    return np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=150)


def weight_figures(
    measured: ModelUnits, layers: Sequence[int], compared: ModelUnits | None = None
) -> dict[str, Figure]:
    """Returns figures 5, 6 (for these layers) and 7 by name, and 5 and 7 of a second model."""
    figures: dict[str, Figure] = {}
    for model, suffix in ((measured, ""), (compared, "_compared")):
        if model is None:
            continue
        hidden = [layer for layer in model.layers if not layer.are_tokens][:_FIRST]
        if hidden:
            panels = [pair_panel(layer, most=_PAIRS) for layer in hidden]
            figures[f"figure5{suffix}"] = pair_page(model.name, panels, _NARROW)
        if model.stem_weights is not None:
            frequency = model.measures["stem"].frequency
            order = np.argsort(np.nan_to_num(frequency, nan=1.0), kind="stable")
            figures[f"figure7{suffix}"] = stem_page(model.name, model.stem_weights[order])
    for layer in map(measured.layer, layers):
        if layer.are_tokens:
            figures[f"tokens_layer{layer.number}"] = token_page(measured.name, layer)
        else:
            page = pair_page(measured.name, [pair_panel(layer, numbered=True)], _WIDE)
            figures[f"figure6_layer{layer.number}"] = page
    return figures


def pair_panel(
    layer: TokenMixingLayer, *, most: int | None = None, numbered: bool = False
) -> Panel:
    """Returns the pairs of a layer, or `most` of them, evenly spaced in the order of figure 5."""
    order = pair_opposites(layer.incoming)
    pairs = math.ceil(len(order) / 2)
    chosen = np.unique(np.linspace(0, pairs - 1, min(pairs, most or pairs)).round().astype(int))
    shown = f"all {len(order)} units" if len(chosen) == pairs else f"{len(chosen)} of {pairs} pairs"
    cells, captions = [], []
    for pair in chosen:
        numbers = order[2 * pair : 2 * pair + 2]
        parts = [_enlarged(unit_pixels(layer.incoming[number]), _UNIT) for number in numbers]
        white = np.full_like(parts[0], 255)
        second = parts[1] if len(parts) == 2 else white
        cells.append(np.concatenate([parts[0], white[:, :3], second], axis=1))
        words = [str(number + 1) for number in numbers] if numbered else []
        if len(numbers) == 2:
            value = correlations(layer.incoming[numbers])[0, 1]
            words.insert(1, f"{value:+.2f}".replace("-", _MINUS))
        captions.append("   ".join(words))
    return f"Layer {layer.number}: {shown}", cells, captions


def pair_page(name: str, panels: Sequence[Panel], columns: int) -> Figure:
    notes = (
        f"Colours: each unit from {_MINUS}max|w| (blue) through 0 (white) to +max|w| (red).",
        "Below each pair: its correlation. Order: lowest spatial frequency first.",
    )
    title = "hidden units of token-mixing MLPs, incoming weights"
    return _page(name, title, panels, columns, notes)


def token_page(name: str, layer: TokenMixingLayer) -> Figure:
    """Returns what each output token reads, laid out like the patches of the image."""
    grid = layer.incoming.shape[1:]
    cells = [_enlarged(unit_pixels(unit), _UNIT) for unit in layer.incoming]
    panel = f"Layer {layer.number}", cells, [""] * len(cells)
    notes = (
        "One map per output token, at the place of its patch: its weights on all input tokens.",
        f"Colours: each map from {_MINUS}max|w| (blue) through 0 (white) to +max|w| (red).",
    )
    title = f"token mixing: what each of {grid[0]}x{grid[1]} tokens reads"
    return _page(name, title, [panel], grid[1], notes)


def stem_page(name: str, units: Floats) -> Figure:
    """Returns figure 7: units (C, P, P, 1 or 3) in this order."""
    cells = [_enlarged(color_pixels(unit), _STEM_UNIT) for unit in units]
    title = f"stem: {len(units)} units of {units.shape[1]}x{units.shape[2]} pixels"
    columns = max(16, math.ceil(math.sqrt(1.5 * len(units))))
    note = "Lowest spatial frequency first. Grey is zero, each unit on its own scale."
    return _page(name, title, [("", cells, [""] * len(cells))], columns, [note])


def _page(
    name: str, title: str, panels: Sequence[Panel], columns: int, notes: Sequence[str]
) -> Figure:
    """Lays panels out side by side in whole pixels, so that no weight is cut unevenly."""
    height, width = panels[0][1][0].shape[:2]
    most = max(len(cells) for _, cells, _ in panels)
    room = _CAPTION if any(captions[0] for _, _, captions in panels) else (0, 0)
    across, down = max(width, room[0]) + _GAP, height + room[1] + _GAP
    panel_width = max(min(columns, most) * across, 560) + _MARGIN
    top = 3 * _LINE
    bottom = top + math.ceil(most / columns) * down + _GAP
    sheet_width = max(len(panels) * panel_width + _MARGIN, _PAGE)
    sheet_height = bottom + _LINE * len(notes) + _GAP
    sheet = np.full((sheet_height, sheet_width, 3), 255, dtype=np.uint8)
    figure = Figure(figsize=(sheet_width / DPI, sheet_height / DPI), dpi=DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))

    def write(x: float, y: float, text: str, size: float, **style: Any) -> None:
        axes.text(x, y, text, va="top", fontsize=size, **style)

    write(_MARGIN, _GAP, shorten(name, 44), 7.5, weight="bold")
    write(_MARGIN, _GAP + _LINE, title, 6.5)
    for at, (heading, cells, captions) in enumerate(panels):
        left = _MARGIN + at * panel_width
        write(left, top - _LINE + 2, heading, 6.5)
        for number, (cell, caption) in enumerate(zip(cells, captions, strict=True)):
            y, x = top + number // columns * down, left + number % columns * across
            x += (across - _GAP - width) // 2
            sheet[y : y + height, x : x + width] = cell
            write(x + width / 2, y + height + 4, caption, 4.6, ha="center")
    for line, note in enumerate(notes):
        write(_MARGIN, bottom + _LINE * line, note, 5)
    extent = (0, sheet_width, sheet_height, 0)
    axes.imshow(sheet, interpolation="none", extent=extent, aspect="auto")
    axes.set_axis_off()
    return figure


def occlusion_figure(pixels: Pixels, result: Occlusion, title: str) -> Figure:
    """Returns the image (H, W, channels) with the drop in its class's probability."""
    drop = 100 * result.patch_drop
    largest = max(float(np.abs(drop).max()), 1e-6)
    figure = new_figure(7.2, 2.05 * _ratio(pixels) + 0.7, DPI)
    figure.suptitle(escape(title), fontsize=8, fontweight="bold")
    whole, under, alone = figure.subplots(1, 3)
    show(whole, pixels)
    whole.set_title(f"predicted: {shorten(result.name)}, {result.probability:.1%}", fontsize=7)
    show(under, blend(pixels, drop, largest))
    window = f"{result.window}x{result.window} patches"
    under.set_title(f"covered by a grey window of\n{window}", fontsize=7)
    mesh = _show_map(alone, drop, pixels, DIVERGING, -largest, largest)
    alone.set_title("mean over the windows\nthat cover a patch", fontsize=7)
    bar = figure.colorbar(mesh, ax=alone, shrink=0.82, pad=0.04)
    bar.set_label(f"drop of p({shorten(result.name)}), points", fontsize=6.5)
    bar.ax.tick_params(labelsize=6)
    return figure


def response_figure(pixels: Pixels, responses: Sequence[UnitResponse], title: str) -> Figure:
    layers: dict[int, list[UnitResponse]] = {}
    for response in sorted(responses, key=lambda response: response.layer):
        layers.setdefault(response.layer, []).append(response)
    rows, cell, image = max(map(len, layers.values())), 0.8, 1.4
    height = rows * (cell * _ratio(pixels) + 0.1) + 0.85
    figure = new_figure(image + 3 * cell * len(layers) + 0.4, height, DPI)
    figure.suptitle(escape(title), fontsize=9, fontweight="bold")
    widths = [image, *[cell] * (3 * len(layers))]
    grid = figure.add_gridspec(rows, len(widths), width_ratios=widths)
    axes = figure.add_subplot(grid[:, 0])
    show(axes, pixels)
    axes.set_title("the image", fontsize=7)
    axes.set_anchor("N")
    for at, (layer, units) in enumerate(layers.items()):
        for row, unit in enumerate(units):
            weights, read, written = (
                figure.add_subplot(grid[row, 1 + 3 * at + column]) for column in range(3)
            )
            scale = _largest(unit.weights)
            _show_map(weights, unit.weights, pixels, DIVERGING, -scale, scale)
            weights.set_ylabel(f"unit {unit.unit + 1}", fontsize=6.5)
            show(read, blend(pixels, unit.read, _largest(unit.read)))
            if unit.written is None:
                written.set_axis_off()
            else:
                _show_map(written, unit.written, pixels, SEQUENTIAL, 0.0, _largest(unit.written))
            if row == 0:
                titles = (f"layer {layer}\nweights", "\nread", "\nwritten")
                for panel, heading in zip((weights, read, written), titles, strict=True):
                    panel.set_title(heading, fontsize=7)
    note = (
        "Weights, read: red positive, blue negative, symmetric about 0. Written: from 0 (dark) to "
        "the largest (yellow). Each map has its own scale."
    )
    figure.supxlabel(note, fontsize=6)
    return figure


def _largest(values: Floats) -> float:
    return max(float(np.abs(values).max()), 1e-30)


def _show_map(
    axes: Axes, values: Floats, pixels: Pixels, cmap: str, low: float, high: float
) -> Any:
    """Draws a map of patches with the aspect ratio of the image."""
    extent = (0, pixels.shape[1], pixels.shape[0], 0)
    return show(axes, values, cmap=cmap, vmin=low, vmax=high, extent=extent)


def _ratio(pixels: Pixels) -> float:
    return min(max(pixels.shape[0] / pixels.shape[1], 0.4), 2.5)


def blend(pixels: Pixels, values: Floats, largest: float) -> NDArray[np.float64]:
    """Returns a map of patches (G_H, G_W), from -largest to largest, as colours (H, W, 3) on [0, 1]
    shaded by the image (H, W, 1 or 3)."""
    sides = zip(pixels.shape, values.shape, strict=False)
    down, right = (np.arange(side) * cells // side for side, cells in sides)
    spread = values[down][:, right]
    colors = matplotlib.colormaps[DIVERGING](0.5 + spread / (2 * largest))[..., :3]
    grey = pixels.mean(axis=2, keepdims=True) / 255.0
    return colors * (_DARKEST + (1 - _DARKEST) * grey)
