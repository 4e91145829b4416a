"""Figures 5, 6 and 7: the weights of units, drawn sharply for the screen and for a paper.

Every weight becomes a square of whole pixels, and the pictures are laid out in pixels, so that
nothing is smoothed or cut unevenly in a PNG. A vector file embeds the same pixels losslessly.
Colours: blue is negative, white zero, red positive; each unit has its own scale, from minus to
plus its largest weight. In figure 7's colour pictures grey is zero, each unit again on its own.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from allmlp.inspection.units import Floats, Integers, pair_correlations

DPI = 300
DIVERGING = "RdBu_r"
VECTORS = ("svg", "pdf")
_MINUS = "\N{MINUS SIGN}"
_SCALE = f"each unit from {_MINUS}max|w| (blue) through 0 (white) to +max|w| (red)"
_ORDER = "Beneath: the correlation of the pair. Order: spatial frequency, lowest first."

# Sizes in pixels at `DPI`.
_UNIT, _INNER, _GAP, _CAPTION, _MARGIN, _HEADER = 80, 5, 16, 26, 24, 60
_TITLE_POINTS, _CAPTION_POINTS = 7.5, 4.6


@dataclass(frozen=True)
class Panel:
    """The pairs of one layer in a figure.

    Attributes:
        title: above it.
        units: (U, G_H, G_W) in the order of `pair_opposites`.
        numbers: (U,) the units' own numbers, from 0; drawn from 1.
        correlations: (U // 2,) of each pair.
    """

    title: str
    units: Floats
    numbers: Integers
    correlations: Floats


def unit_pixels(unit: Floats) -> NDArray[np.uint8]:
    """Returns the weights (G_H, G_W) as colours (G_H, G_W, 3), symmetric about zero."""
    largest = float(np.abs(unit).max())
    place = 0.5 + unit / (2 * largest) if largest > 0 else np.full(unit.shape, 0.5)
    return (matplotlib.colormaps[DIVERGING](place)[..., :3] * 255).round().astype(np.uint8)


def color_pixels(unit: Floats) -> NDArray[np.uint8]:
    """Returns the weights (P, P, 1 or 3) as colours (P, P, 3): grey is zero."""
    largest = float(np.abs(unit).max())
    place = 0.5 + unit / (2 * largest) if largest > 0 else np.full(unit.shape, 0.5)
    return np.repeat((place * 255).round().astype(np.uint8), 3 // unit.shape[2], axis=2)


def enlarge(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Returns every pixel as a square of `factor` x `factor`."""
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def choose_pairs(num_units: int, most: int) -> Integers:
    """Returns the places of at most so many pairs, taken evenly over an order of pairs."""
    pairs = math.ceil(num_units / 2)
    chosen = np.unique(np.linspace(0, pairs - 1, min(pairs, most)).round().astype(int))
    places = np.stack([2 * chosen, 2 * chosen + 1], axis=1).ravel()
    return places[places < num_units]


def layer_panel(name: str, units: Floats, order: Integers, most: int | None = None) -> Panel:
    """Returns the pairs of a layer for a figure; its title says how many are shown.

    Args:
        name: of the layer, the beginning of the title.
        units: (U, G_H, G_W) in their own order.
        order: (U,) by `pair_opposites`.
        most: pairs, taken evenly over the order; None shows all.
    """
    pairs = math.ceil(len(order) / 2)
    chosen = order[choose_pairs(len(order), most or pairs)]
    shown = math.ceil(len(chosen) / 2)
    what = f"all {len(order)} units" if shown == pairs else f"{shown} of {pairs} pairs, evenly"
    return Panel(f"{name}: {what}", units[chosen], chosen, pair_correlations(units[chosen]))


def pair_figure(
    panels: Sequence[Panel], title: str, *, columns: int, numbered: bool = False
) -> Figure:
    """Returns pairs of units in rows, the panels side by side, the correlation beneath each pair.

    Args:
        panels: one for each layer, all of the same grid.
        title: above all of them.
        columns: pairs in a row of a panel.
        numbered: the units' numbers stand beneath them as well.
    """
    grid = panels[0].units.shape[1:]
    factor = max(1, round(_UNIT / max(grid)))
    height, width = grid[0] * factor, grid[1] * factor
    inner, gap = _INNER, _GAP
    # Room for the caption: "123  -0.97  123" beneath a pair, also where a unit is narrow.
    pair_width = max(2 * width + inner, 170 if numbered else 80)
    cell_width, cell_height = pair_width + gap, height + _CAPTION + gap
    rows = max(math.ceil(len(panel.units) / 2 / columns) for panel in panels)
    used = min(columns, max(math.ceil(len(panel.units) / 2) for panel in panels))
    panel_width = max(used * cell_width - gap, 560)
    space = 2 * _MARGIN
    width_of_sheet = len(panels) * (panel_width + space) - space + 2 * _MARGIN
    above = _wrapped(title, width_of_sheet, _TITLE_POINTS * 1.15)
    below = _wrapped(f"Colours: {_SCALE}. {_ORDER}", width_of_sheet, _CAPTION_POINTS + 0.4)
    top = _MARGIN + len(above) * 40
    bottom = top + _HEADER + rows * cell_height
    sheet = _Sheet(width_of_sheet, bottom + 28 * len(below) + _MARGIN)
    for line, text in enumerate(above):
        sheet.text(_MARGIN, _MARGIN + 40 * line, text, _TITLE_POINTS, weight="bold")
    for line, text in enumerate(below):
        sheet.text(_MARGIN, bottom + 28 * line, text, _CAPTION_POINTS + 0.4)
    for at, panel in enumerate(panels):
        left = _MARGIN + at * (panel_width + space)
        sheet.text(left, top + 6, panel.title, _TITLE_POINTS - 1)
        for pair in range(math.ceil(len(panel.units) / 2)):
            row, column = divmod(pair, columns)
            x = left + column * cell_width + (pair_width - 2 * width - inner) // 2
            y = top + _HEADER - 6 + row * cell_height
            both = range(2 * pair, min(2 * pair + 2, len(panel.units)))
            for side, place in enumerate(both):
                here = x + side * (width + inner)
                sheet.paste(here, y, enlarge(unit_pixels(panel.units[place]), factor))
            _caption(sheet, panel, both, x, y + height + 4, 2 * width + inner, numbered)
    return sheet.figure()


def _caption(
    sheet: _Sheet, panel: Panel, both: range, x: int, y: int, width: int, numbered: bool
) -> None:
    middle = x + width / 2
    if len(both) == 2:
        value = panel.correlations[both[0] // 2]
        text = "-" if np.isnan(value) else f"{value:+.2f}".replace("-", _MINUS)
        sheet.text(middle, y, text, _CAPTION_POINTS, ha="center")
    if numbered:
        for side, place in enumerate(both):
            number = str(panel.numbers[place] + 1)
            align, edge = (("left", min(x, middle - 80)), ("right", max(x + width, middle + 80)))[
                side
            ]
            sheet.text(edge, y, number, _CAPTION_POINTS - 0.6, ha=align, color="#777777")


def color_figure(units: Floats, title: str, subtitle: str) -> Figure:
    """Returns figure 7: the units (C, P, P, 1 or 3) in the order that they are given in."""
    count, side = len(units), max(units.shape[1:3])
    factor = max(1, round(64 / side))
    height, width = units.shape[1] * factor, units.shape[2] * factor
    columns = min(count, max(16, math.ceil(math.sqrt(1.5 * count))))
    rows, gap = math.ceil(count / columns), 8
    width_of_sheet = max(columns * (width + gap) - gap, 700) + 2 * _MARGIN
    above = _wrapped(title, width_of_sheet, _TITLE_POINTS * 1.15)
    below = _wrapped(subtitle, width_of_sheet, _TITLE_POINTS - 1.5)
    middle = _MARGIN + 40 * len(above) + 6
    top = middle + 32 * len(below) + 12
    sheet = _Sheet(width_of_sheet, top + rows * (height + gap) + _MARGIN)
    for line, text in enumerate(above):
        sheet.text(_MARGIN, _MARGIN + 40 * line, text, _TITLE_POINTS, weight="bold")
    for line, text in enumerate(below):
        sheet.text(_MARGIN, middle + 32 * line, text, _TITLE_POINTS - 1.5)
    for number, unit in enumerate(units):
        row, column = divmod(number, columns)
        x, y = _MARGIN + column * (width + gap), top + row * (height + gap)
        sheet.paste(x, y, enlarge(color_pixels(unit), factor))
    return sheet.figure()


def _wrapped(text: str, width: int, points: float) -> list[str]:
    """The lines of a text that fits a sheet of so many pixels; letters are 0.57 em on average."""
    letters = int((width - 2 * _MARGIN) / (0.57 * points * DPI / 72))
    return textwrap.wrap(text, max(letters, 20))


class _Sheet:
    """White paper, addressed in pixels from the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._pixels = np.full((height, width, 3), 255, dtype=np.uint8)
        self._texts: list[tuple[float, float, str, dict[str, object]]] = []

    def paste(self, x: int, y: int, pixels: NDArray[np.uint8]) -> None:
        """Puts a picture down with a hair-thin frame around it."""
        height, width = pixels.shape[:2]
        self._pixels[y - 1 : y + height + 1, x - 1 : x + width + 1] = 150
        self._pixels[y : y + height, x : x + width] = pixels

    def text(self, x: float, y: float, text: str, points: float, **options: object) -> None:
        self._texts.append((x, y, text, {"fontsize": points, "va": "top", **options}))

    def figure(self) -> Figure:
        figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.imshow(
            self._pixels,
            interpolation="none",
            extent=(0, self.width, self.height, 0),
            aspect="auto",
        )
        axes.set_axis_off()
        for x, y, text, options in self._texts:
            axes.text(x, y, as_drawn(text), **options)  # pyright: ignore[reportArgumentType]
        return figure


def as_drawn(text: str) -> str:
    """Returns the text as matplotlib draws it: no formulas between "$", no invalid characters."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def save_figure(figure: Figure, path: Path, kind: str) -> None:
    """Writes a figure; the same figure gives the same bytes.

    Args:
        figure: to write.
        path: of the file, whatever its ending is.
        kind: "png", "svg" or "pdf".
    """
    dates: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "allmlp", "pdf.fonttype": 42}):
        figure.savefig(path, format=kind, dpi=DPI, metadata=dates.get(kind))
