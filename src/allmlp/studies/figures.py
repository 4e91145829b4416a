"""The figures of the studies and of the report: data scale, and accuracy against cost and speed.

What the paper printed and what was measured here never share a panel: other hardware and other data
make other axes. The paper's points are circles, ours are diamonds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from allmlp.io import atomic_write
from allmlp.plots import escape, shorten
from allmlp.studies.paper import HARDWARE, Result, frontier, number

# The paper's colours of the three kinds of networks; what was measured here has one of its own.
COLORS = {"MLP": "#d6336c", "attention": "#1c7ed6", "convolution": "#e0a100"}
OURS, _INK, _GRID, _PAPER_GROUND = "#1a7f37", "#333333", "#dddddd", "#f6f6f4"
_LINES = ("#d6336c", "#7048e8", "#0c8599", "#e8590c", "#2b8a3e", "#495057")
_MARKERS = ("o", "s", "^", "D", "v", "P")
MOST_PANELS = 3  # of measured points in one picture


@dataclass(frozen=True)
class Point:
    """A point of our own panels.

    Attributes:
        label: the model.
        x: device-days, or images a second.
        accuracy: top-1, 0 to 1.
        hardware: that `x` belongs to.
        data: that the accuracy was measured on.
        is_imagenet: whether these are the paper's images.
    """

    label: str
    x: float
    accuracy: float
    hardware: str
    data: str
    is_imagenet: bool


def save_picture(figure: Figure, path: Path) -> None:
    """Writes the figure whole or not at all, as PNG or SVG by its name; the folder must exist."""
    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {}

    def write(aside: Path) -> None:
        with mpl.rc_context({"svg.hashsalt": "allmlp", "svg.fonttype": "none"}):
            figure.savefig(aside, format=kind, dpi=150, metadata=metadata)

    atomic_write(path, write)


def data_scale_figure(
    points: Sequence[dict[str, Any]], label: str, measured_on: str, trained_on: str, steps: int
) -> Figure:
    """Returns figure 2, right: accuracy against the number of training images, a line a model.

    Args:
        points: as `DataScale.points` has them.
        label: of the first panel's accuracy.
        measured_on: the few-shot data.
        trained_on: the training data.
        steps: of every run.
    """
    figure = Figure(figsize=(10.4, 4.5), layout="constrained")
    few, upstream = figure.subplots(1, 2)
    models = list(dict.fromkeys(each["model"] for each in points))
    for at, model in enumerate(models):
        own = sorted((p for p in points if p["model"] == model), key=lambda p: p["images"])
        images = [each["images"] for each in own]
        style: dict[str, Any] = {"color": _LINES[at % 6], "marker": _MARKERS[at % 6]}
        style |= {"markersize": 6, "linewidth": 1.8, "label": escape(own[0]["label"])}
        few.errorbar(
            images,
            [100 * each["few_shot"] for each in own],
            yerr=[100 * (each["deviation"] or 0.0) for each in own],
            capsize=3,
            elinewidth=1.0,
            **style,
        )
        upstream.plot(images, [100 * each["validation"] for each in own], **style)
    ticks = sorted({each["images"]: each["fraction"] for each in points}.items())
    few.set_title(f"few-shot on {shorten(measured_on, 44)}", fontsize=10, color=_INK)
    few.set_ylabel(escape(label))
    upstream.set_title("upstream: held-out images, best weights", fontsize=10, color=_INK)
    upstream.set_ylabel("validation top-1 (%)")
    for axes in (few, upstream):
        _finish(axes)
        axes.set_xlabel("training images (share of the set)")
        names = [f"{images:,}\n{100 * share:.4g} %" for images, share in ticks]
        axes.xaxis.set_major_locator(FixedLocator([images for images, _ in ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([images for images, _ in ticks], names, fontsize=9)
        axes.margins(x=0.08, y=0.1)
    handles, names = few.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    bars = sorted({each["deviation_of"] for each in points if each["deviation_of"]})
    note = f"bars: standard deviation of {' or '.join(bars)}" if bars else "no bars: one draw"
    title = f"{shorten(trained_on, 50)}: {steps:,} steps for every point; {note}"
    figure.suptitle(title, fontsize=10, color="#555555")
    return figure


def cost_figure(panels: Sequence[tuple[str, Sequence[Result]]], ours: Sequence[Point]) -> Figure:
    """Returns figures 2 and 3, left: accuracy against the cost of the pre-training.

    Args:
        panels: title and rows of each panel of the paper's.
        ours: measured here, x in device-days; a panel for each hardware and data.
    """
    printed = [
        (title, [(row, number(row.core_days)) for row in rows], "pre-training cost ({0} core-days)")
        for title, rows in panels
    ]
    return _figure(printed, ours, "training cost (device-days)", more_is_better=False)


def throughput_figure(
    panels: Sequence[tuple[str, Sequence[Result]]], ours: Sequence[Point]
) -> Figure:
    """Returns figure 3, right: accuracy against the throughput.

    Args:
        panels: title and rows of each panel of the paper's.
        ours: measured here, x in images a second; a panel for each hardware and data.
    """
    printed = [
        (title, [(row, number(row.throughput)) for row in rows], "throughput (img/s per {0} core)")
        for title, rows in panels
    ]
    return _figure(printed, ours, "throughput (img/s)", more_is_better=True)


_Printed = tuple[str, list[tuple[Result, float | None]], str]


def _figure(
    printed: Sequence[_Printed], ours: Sequence[Point], x_label: str, *, more_is_better: bool
) -> Figure:
    """A row of the paper's panels, and below it a row of ours."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in dict.fromkeys(ours):  # a run and an evaluation of it are the same point
        groups.setdefault((point.hardware, point.data), []).append(point)
    shown = sorted(groups.items(), key=lambda each: -len(each[1]))[:MOST_PANELS]
    columns, rows = max(len(printed), len(shown), 1), 1 + bool(shown)
    figure = Figure(figsize=(max(7.2, 6.0 * columns), 4.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    bands = list(np.ravel(np.array(figure.subfigures(rows, 1))))
    labels: list[tuple[Axes, list[tuple[float, float, str]]]] = []
    bands[0].suptitle(f"paper ({HARDWARE}), as printed", fontsize=11, weight="bold", color=_INK)
    bands[0].set_facecolor(_PAPER_GROUND)
    for axes, (title, each, unit) in zip(
        np.ravel(bands[0].subplots(1, len(printed), squeeze=False)), printed, strict=True
    ):
        labels.append((axes, _paper_panel(axes, title, each, more_is_better)))
        axes.set_xlabel(unit.format(HARDWARE))
        axes.set_ylabel("ImageNet top-1 (%)")
    if shown:
        bands[1].suptitle("measured here", fontsize=11, weight="bold", color=OURS)
        panels = np.ravel(bands[1].subplots(1, len(shown), squeeze=False))
        for axes, ((hardware, data), points) in zip(panels, shown, strict=True):
            labels.append((axes, _our_panel(axes, points, more_is_better)))
            not_imagenet = not all(each.is_imagenet for each in points)
            title = f"{shorten(data, 56)}\non {shorten(hardware, 48)}"
            axes.set_title(title, fontsize=9.5, color=OURS)
            axes.set_xlabel(x_label)
            axes.set_ylabel("top-1 (%), not ImageNet" if not_imagenet else "ImageNet top-1 (%)")
    figure.draw_without_rendering()
    for axes, texts in labels:
        _place_labels(axes, texts)
    return figure


def _paper_panel(
    axes: Axes, title: str, rows: list[tuple[Result, float | None]], more_is_better: bool
) -> list[tuple[float, float, str]]:
    known = []
    for row, x in rows:
        accuracy = number(row.imagenet)
        if x is not None and accuracy is not None:
            known.append((row, x, accuracy))
            ring = {"facecolor": "white", "edgecolor": COLORS[row.family], "linewidth": 1.8}
            axes.scatter([x], [accuracy], s=46, marker="o", zorder=3, **ring)
    _draw_frontier(axes, [(x, y) for _, x, y in known], more_is_better, "#888888")
    _finish(axes)
    axes.set_title(title, fontsize=9.5, color=_INK)
    handles = [
        Line2D([], [], ls="", marker="o", mfc="white", mec=color, mew=1.8, label=family)
        for family, color in COLORS.items()
        if any(row.family == family for row, _, _ in known)
    ]
    line = Line2D([], [], ls="--", lw=1.2, color="#888888", label="Pareto frontier")
    place = "lower left" if more_is_better else "lower right"
    axes.legend(handles=[*handles, line], loc=place, fontsize=8, frameon=False)
    double = [(row.model, row.data) for row, _, _ in known]
    names = [
        row.model + (f", {row.epochs} ep." if double.count((row.model, row.data)) > 1 else "")
        for row, _, _ in known
    ]
    return [(x, y, name) for (_, x, y), name in zip(known, names, strict=True)]


def _our_panel(
    axes: Axes, points: Sequence[Point], more_is_better: bool
) -> list[tuple[float, float, str]]:
    texts = [(each.x, 100 * each.accuracy, shorten(each.label, 26)) for each in points]
    values = [(x, y) for x, y, _ in texts]
    axes.scatter(*zip(*values, strict=True), s=52, marker="D", color=OURS, zorder=3)
    _draw_frontier(axes, values, more_is_better, OURS)
    _finish(axes)
    low, high = min(each.x for each in points), max(each.x for each in points)
    if high < 8 * low:  # points close together have no scale of their own
        middle = math.sqrt(low * high)
        axes.set_xlim(middle / 5, middle * 5)
    handles = [Line2D([], [], ls="", marker="D", color=OURS, label="measured here")]
    if len(points) > 1:
        handles.append(Line2D([], [], ls="--", lw=1.2, color=OURS, label="Pareto frontier"))
    axes.legend(handles=handles, loc="best", fontsize=8, frameon=False)
    return texts


def _draw_frontier(
    axes: Axes, points: list[tuple[float, float]], more_is_better: bool, color: str
) -> None:
    best = [points[at] for at in frontier(points, more_is_better=more_is_better)]
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), ls="--", lw=1.2, color=color, zorder=2)


def _finish(axes: Axes) -> None:
    """A logarithmic x-axis with readable numbers, a light grid, no box."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=30))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.14, y=0.14)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 101.0))  # per cent
    axes.tick_params(labelsize=9, colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _place_labels(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Writes each name beside its point, where it covers no point and no other name."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    at = [axes.transData.transform((x, y)) for x, y, _ in points]
    unit = figure.dpi / 72
    taken = [Bbox.from_bounds(x - 5 * unit, y - 5 * unit, 10 * unit, 10 * unit) for x, y in at]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer))
    inside = axes.get_window_extent(renderer)
    for x, y, name in sorted(points, key=lambda each: (each[0], each[1])):
        text = axes.annotate(
            name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8, color=_INK
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        chosen = None
        for (dx, dy), (across, along) in _PLACES:
            text.set(ha=across, va=along)
            text.xyann = (dx, dy)
            box = text.get_window_extent(renderer)
            is_free = not any(box.overlaps(each) for each in taken)
            if is_free and inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1):
                chosen = box
                break
        if chosen is None:
            dx, dy = _PLACES[0][0]
            text.set(ha="left", va="center")
            text.xyann = (dx, dy)
            chosen = text.get_window_extent(renderer)
        taken.append(chosen)


# Where a name may stand: offset in points, and how it is aligned there; the best first.
_PLACES = [
    ((7, 0), ("left", "center")),
    ((-7, 0), ("right", "center")),
    ((0, 7), ("center", "bottom")),
    ((0, -7), ("center", "top")),
    ((6, 6), ("left", "bottom")),
    ((-6, 6), ("right", "bottom")),
    ((6, -6), ("left", "top")),
    ((-6, -6), ("right", "top")),
    ((9, 15), ("left", "bottom")),
    ((-9, 15), ("right", "bottom")),
    ((9, -15), ("left", "top")),
    ((-9, -15), ("right", "top")),
]
