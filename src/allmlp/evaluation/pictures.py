"""Pictures of an evaluation: the confusion matrix, the reliability diagram and grids of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from allmlp.data.image import decode, to_pillow
from allmlp.data.items import Source
from allmlp.errors import plural
from allmlp.evaluation.accuracy import Evaluation
from allmlp.io import atomic_write

# What `save_report` writes.
REPORT = ("confusion", "reliability", "predictions", "worst_mistakes")
RIGHT, WRONG = "#1a7f37", "#cf222e"
_MOST_NUMBERED, _MOST_NAMED = 20, 60  # classes up to which cells carry numbers, axes all names


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG, whole or not at all; the folder must exist."""
    atomic_write(path, lambda aside: figure.savefig(aside, format="png", dpi=120))


def confusion_matrix(evaluation: Evaluation) -> Figure:
    """Returns the confusion matrix: rows are true classes, shades their shares."""
    counts = evaluation.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(counts)
    side = min(4.0 + 0.38 * classes, 16.0)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    mesh = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(mesh, ax=axes, label="share of the true class", shrink=0.8)
    step = math.ceil(classes / _MOST_NAMED)
    names = [shorten(name, 18) for name in evaluation.class_names[::step]]
    positions = range(0, classes, step)
    slant = 0 if max(map(len, names)) <= 2 else 90
    axes.set_xticks(positions, names, rotation=slant, fontsize=8)
    axes.set_yticks(positions, names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(
        f"{as_drawn(evaluation.data)}: {evaluation.top1:.2%} of "
        f"{plural(len(evaluation.labels), 'image')} right"
    )
    if classes <= _MOST_NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            shade = "white" if shares[row, column] > 0.5 else "black"
            text = str(counts[row, column])
            axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=8)
    return figure


def reliability_diagram(evaluation: Evaluation) -> Figure:
    """Returns accuracy against confidence in 15 bins, and how many images each bin has."""
    bins = evaluation.reliability
    width = 1.0 / len(bins.images)
    middle = (np.arange(len(bins.images)) + 0.5) * width
    figure = Figure(figsize=(6.0, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    filled = bins.images > 0
    accuracy = bins.correct[filled] / bins.images[filled]
    upper.bar(middle[filled], accuracy, 0.92 * width, color="#4c78a8", label="accuracy")
    confidence = bins.confidence[filled] / bins.images[filled]
    upper.plot(confidence, accuracy, "o", color="#222222", ms=4, label="at its mean confidence")
    upper.plot([0, 1], [0, 1], "--", color="#888888", label="as sure as it is right")
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    upper.legend(loc="upper left", fontsize=8)
    upper.set_title(
        f"{as_drawn(evaluation.data)}: expected calibration error {bins.error:.2%}, "
        f"{plural(len(evaluation.labels), 'image')}",
        fontsize=10,
    )
    lower.bar(middle, bins.images, 0.92 * width, color="#bbbbbb")
    lower.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    return figure


def prediction_grid(evaluation: Evaluation, source: Source, most: int = 36) -> Figure:
    """Returns a grid of images, evenly taken over the data, with the predicted classes."""
    count = min(most, len(evaluation.labels))
    places = np.linspace(0, len(evaluation.labels) - 1, count).round().astype(int)
    right = int((evaluation.predictions == evaluation.labels)[places].sum())
    title = f"{evaluation.data}: {plural(count, 'image')}, {right} right (green), "
    title += f"{count - right} wrong (red)"
    return _grid(evaluation, source, places, title)


def worst_mistakes(evaluation: Evaluation, source: Source, most: int = 25) -> Figure:
    """Returns the wrongly classified images whose true class got least; where there are none,
    the right ones with the least certain answer."""
    order = np.argsort(-evaluation.losses, kind="stable")
    wrong = order[(evaluation.predictions != evaluation.labels)[order]]
    if len(wrong):
        title = f"{evaluation.data}: {len(wrong)} mistakes of {len(order)}, the worst first"
        return _grid(evaluation, source, wrong[:most], title)
    title = f"{evaluation.data}: no mistakes of {len(order)}; the least certain first"
    return _grid(evaluation, source, order[:most], title)


def _grid(evaluation: Evaluation, source: Source, places: np.ndarray, title: str) -> Figure:
    images, captions, colors = [], [], []
    for place in places:
        index, label = int(evaluation.indices[place]), int(evaluation.labels[place])
        predicted = int(evaluation.predictions[place])
        share = float(evaluation.probabilities[place, predicted])
        images.append(to_pillow(decode(source.read(index), source.item_name(index))))
        caption = f"{shorten(evaluation.class_names[predicted])} {share:.0%}"
        if predicted != label:
            caption += f"\ntrue: {shorten(evaluation.class_names[label])}"
        captions.append(caption)
        colors.append(RIGHT if predicted == label else WRONG)
    return image_grid(images, captions, title, colors)


def image_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    title: str,
    colors: Sequence[str] | None = None,
) -> Figure:
    """Returns pictures in rows and columns with a caption above each.

    Args:
        images: any sizes; large ones are made smaller.
        captions: one for each.
        title: above all of them.
        colors: of the captions and the frames; None draws them black and grey.
    """
    columns = max(1, math.ceil(math.sqrt(len(images))))
    rows = max(1, math.ceil(len(images) / columns))
    width = max(1.45 * columns, 5.0)
    figure = Figure(figsize=(width, 1.75 * rows + 0.6), layout="constrained")
    figure.suptitle(as_drawn(title), fontsize=10)
    panels: list[Axes] = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axes in panels[len(images) :]:
        axes.set_axis_off()
    for number, (axes, image, caption) in enumerate(zip(panels, images, captions, strict=False)):
        image.thumbnail((224, 224))
        pixels = np.asarray(image)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(caption, fontsize=8, color=colors[number] if colors else "black")
        for spine in axes.spines.values():
            spine.set_color(colors[number] if colors else "#888888")
            spine.set_linewidth(2.0 if colors else 0.8)
    return figure


def shorten(name: str, most: int = 22) -> str:
    """Returns the name for a figure, cut in its middle where it is longer than `most`."""
    if len(name) > most:
        half = (most - 2) // 2
        name = f"{name[:half]}..{name[-half:]}"
    return as_drawn(name)


def as_drawn(text: str) -> str:
    """Returns the text as matplotlib draws it: no formulas between "$", no invalid characters."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def save_report(evaluation: Evaluation, source: Source, folder: Path) -> list[str]:
    """Writes the figures of `REPORT` as PNG; returns their names."""
    figures = (
        confusion_matrix(evaluation),
        reliability_diagram(evaluation),
        prediction_grid(evaluation, source),
        worst_mistakes(evaluation, source),
    )
    for name, figure in zip(REPORT, figures, strict=True):
        save_figure(figure, folder / f"{name}.png")
    return list(REPORT)
