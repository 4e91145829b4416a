"""Figures for training, evaluation and data check; drawing and saving for all figures."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from allmlp.data.image import decode, to_pillow
from allmlp.data.source import Source, array_row, array_shape
from allmlp.data.transforms import denormalize
from allmlp.errors import UserError, plural
from allmlp.io import atomic_write
from allmlp.preprocessing import Preprocessing

if TYPE_CHECKING:
    from allmlp.data.check import Duplicates

Evaluation = Any  # class in evaluation/, which imports from here
# An image or none, its caption, and the color of caption and frame, or "".
Cell = tuple[NDArray[np.uint8] | None, str, str]
# Files written by `save_evaluation`.
EVALUATION = ("confusion", "reliability", "predictions", "worst_mistakes")
GREEN, RED, GREY = "#1a7f37", "#cf222e", "#888888"
_PAIR_COLORS = ("#0969da", "#bc4c00")
# Chinese, Japanese, Korean, Hindi, ... on Linux, Windows and macOS.
_FONTS = ("Noto Sans CJK SC", "WenQuanYi Zen Hei", "Noto Sans Devanagari", "Microsoft YaHei")
_FONTS += ("Malgun Gothic", "Yu Gothic", "Nirmala UI", "PingFang SC", "Arial Unicode MS")
_MAX_NUMBERED, _MAX_NAMED = 20, 60  # classes up to which cells show counts, axes all names
_MAX_SAMPLES, _MAX_PAIRS = 72, 24
# Columns of results.csv by preference: the second with several labels per image, the third where
# no image has one.
_MAIN = {"validation_top1": "accuracy", "validation_mean_average_precision": "mAP"}
_MAIN |= {"validation_micro_f1": "micro F1"}
_THUMBNAIL = 224  # longer side in pixels


def new_figure(width: float, height: float, dpi: int = 120) -> Figure:
    """Returns an empty figure; size in inches."""
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def writer(figure: Figure, kind: str) -> Callable[[Path], None]:
    """Returns a function that writes a figure as "png" or "svg", reproducibly."""
    metadata: Any = {"Date": None} if kind == "svg" else None

    def write(path: Path) -> None:
        for text in figure.findobj(Text):
            if isinstance(text, Text) and not text.get_text().isascii():
                text.set_fontfamily(_families())
        with (
            matplotlib.rc_context({"svg.hashsalt": "allmlp", "svg.fonttype": "none"}),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(path, format=kind, metadata=metadata)

    return write


@functools.cache
def _families() -> list[str]:
    """The default font, and the installed ones that have most of what it lacks."""
    there = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FONTS if name in there)]


def save(figure: Figure, path: Path) -> None:
    """Writes a figure atomically, in the format of the file extension; the folder must exist."""
    atomic_write(path, writer(figure, path.suffix.removeprefix(".")))


def escape(text: str) -> str:
    """Escapes text for matplotlib: no formulas, no invalid characters."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def shorten(name: str, most: int = 22) -> str:
    """Shortens a name in the middle to at most `most` characters."""
    if len(name) > most:
        half = (most - 2) // 2
        name = f"{name[:half]}..{name[-half:]}"
    return escape(name)


def show(axes: Axes, pixels: NDArray[Any], **options: Any) -> Any:
    """Draws an image, (H, W) or (H, W, 1 or 3), with sharp pixels and without ticks."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype == np.uint8:
        options = {"cmap": "gray", "vmin": 0, "vmax": 255, **options}
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(pixels, interpolation="nearest", **options)


def grid(cells: Sequence[Cell], title: str, columns: int | None = None) -> Figure:
    """Returns a grid of images with a caption above each."""
    count = max(len(cells), 1)
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    lines = max((caption.count("\n") + 1 for _, caption, _ in cells), default=1)
    figure = new_figure(max(1.4 * columns, 5.0), (1.35 + 0.15 * lines) * rows + 0.5)
    figure.suptitle(escape(title), fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    empty: list[Cell] = [(None, "", "")] * (rows * columns - len(cells))
    for axes, (image, caption, color) in zip(panels, [*cells, *empty], strict=True):
        axes.set_title(caption, fontsize=8, color=color or "black")
        if image is None:
            axes.set_axis_off()
            continue
        show(axes, image)
        axes.spines[:].set(color=color or GREY, linewidth=2.0 if color else 0.8)
    return figure


def thumbnail(source: Source, index: int) -> NDArray[np.uint8] | None:
    """Returns a small version of an image, or None if it cannot be decoded."""
    if array_shape(source) is not None:
        return curve(array_row(source, index))
    try:
        image = to_pillow(decode(source.read(index), source.item_name(index)))
    except UserError:
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(image)


def curve(row: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Returns a row of an array, (C, H, W), as a small image: a curve per channel, or a grid."""
    low, high = row.min(), row.max()
    scaled = (row - low) / (high - low or 1.0)
    if row.shape[1] > 1:
        return (scaled.mean(axis=0) * 255).round().astype(np.uint8)
    tall, wide = _THUMBNAIL * 2 // 3, _THUMBNAIL
    canvas, dots = np.full((tall, wide), 255, np.uint8), np.arange(tall * wide)
    places = dots * ((row.shape[2] - 1) / len(dots))
    for values in scaled[:, 0]:
        height = np.interp(places, np.arange(len(values)), values)
        canvas[((1 - height) * (tall - 1)).round().astype(int), dots // tall] = 0
    return canvas


# Evaluation


def save_evaluation(evaluation: Evaluation, source: Source, folder: Path) -> list[str]:
    """Writes the figures in `EVALUATION` as PNG; returns the file names."""
    figures = {
        "reliability": reliability_diagram(evaluation),
        "predictions": prediction_grid(evaluation, source),
        "worst_mistakes": worst_mistakes(evaluation, source),
    }
    (folder / "confusion.png").unlink(missing_ok=True)  # of an earlier evaluation
    if evaluation.has_confusion:
        figures = {"confusion": confusion_matrix(evaluation), **figures}
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")
    return list(figures)


def confusion_matrix(evaluation: Evaluation) -> Figure:
    """Returns the confusion matrix: rows are true classes, shades are row fractions."""
    counts = evaluation.confusion
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(counts)
    side = min(4.0 + 0.38 * classes, 16.0)
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    mesh = axes.imshow(fractions, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(mesh, ax=axes, label="fraction of the true class", shrink=0.8)
    step = math.ceil(classes / _MAX_NAMED)
    names = [shorten(name, 18) for name in evaluation.class_names[::step]]
    positions = range(0, classes, step)
    slant = 0 if max(map(len, names)) <= 2 else 90
    axes.set_xticks(positions, names, rotation=slant, fontsize=8)
    axes.set_yticks(positions, names, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    images = plural(len(evaluation.labels), "image")
    axes.set_title(f"{escape(evaluation.data)}: {evaluation.top1:.2%} of {images} correct")
    if classes <= _MAX_NUMBERED:
        rows = evaluation.per_class()
        recall, precision, f1 = (
            ["-" if row[name] is None else f"{row[name]:.0%}" for row in rows]
            for name in ("recall", "precision", "f1")
        )
        both = [f"{r} / {f}" for r, f in zip(recall, f1, strict=True)]
        axes.secondary_yaxis("right", ylabel="recall / F1").set_yticks(positions, both, fontsize=8)
        axes.secondary_xaxis("top", xlabel="precision").set_xticks(positions, precision, fontsize=8)
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if fractions[row, column] > 0.5 else "black"
            text = str(counts[row, column])
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    return figure


def reliability_diagram(evaluation: Evaluation) -> Figure:
    """Returns accuracy against confidence in 15 bins, with the number of images per bin."""
    bins = evaluation.reliability
    what = ("accuracy", "probability of the predicted class", "images")
    if evaluation.is_multi_label:
        what = ("fraction that has the label", "probability of a label", "labels of images")
    width = 1.0 / len(bins.images)
    middle = (np.arange(len(bins.images)) + 0.5) * width
    figure = new_figure(6.0, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    filled = bins.images > 0
    accuracy = bins.correct[filled] / bins.images[filled]
    upper.bar(middle[filled], accuracy, 0.92 * width, color="#4c78a8", label=what[0])
    confidence = bins.confidence[filled] / bins.images[filled]
    upper.plot(confidence, accuracy, "o", color="#222222", ms=4, label="at the mean confidence")
    upper.plot([0, 1], [0, 1], "--", color=GREY, label="perfect calibration")
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel=what[0])
    upper.legend(loc="upper left", fontsize=8)
    title = f"{escape(evaluation.data)}: expected calibration error {bins.error:.2%}, "
    upper.set_title(title + plural(len(evaluation.labels), "image"), fontsize=10)
    lower.bar(middle, bins.images, 0.92 * width, color="#bbbbbb")
    lower.set(xlabel=f"confidence ({what[1]})", ylabel=what[2])
    return figure


def prediction_grid(evaluation: Evaluation, source: Source, most: int = 36) -> Figure:
    """Returns evenly sampled images with their predicted classes."""
    count = min(most, len(evaluation.labels))
    rows = np.linspace(0, len(evaluation.labels) - 1, count).round().astype(int)
    correct = int(evaluation.correct[rows].sum())
    title = f"{evaluation.data}: {plural(count, 'image')}, {correct} correct (green), "
    return _predictions(evaluation, source, rows, f"{title}{count - correct} wrong (red)")


def worst_mistakes(evaluation: Evaluation, source: Source, most: int = 25) -> Figure:
    """Returns the images whose true class is least probable: the misclassified ones, if any."""
    order, wrong = np.argsort(-evaluation.losses, kind="stable"), evaluation.mistakes()
    what = f"{len(wrong)} mistakes of {len(order)}, the least probable truth first"
    rows = (wrong if len(wrong) else order)[:most]
    return _predictions(evaluation, source, rows, f"{evaluation.data}: {what}")


def _predictions(evaluation: Evaluation, source: Source, rows: np.ndarray, title: str) -> Figure:
    cells: list[Cell] = []
    for row in rows:
        index, is_correct = int(evaluation.indices[row]), evaluation.correct[row]
        lines = [f"{shorten(name)} {value:.0%}" for name, value in evaluation.predicted(row)[:3]]
        lines = lines or ["none"]
        if not is_correct:
            lines.append(f"true: {shorten(source.label_text(index) or 'none')}")
        color = GREEN if is_correct else RED
        cells.append((thumbnail(source, index), "\n".join(lines), color))
    return grid(cells, title)


# Training


def curves(metrics: Sequence[Mapping[str, float]], results: Sequence[Mapping[str, Any]]) -> Figure:
    """Returns loss, accuracy and learning rate over epochs, from metrics.jsonl and results.csv."""
    needed = {"epoch", "loss", "learning_rate"}
    steps = [line for line in metrics if needed <= line.keys()]  # none in a damaged log
    rows = [{key: float(value) for key, value in row.items()} for row in results]
    epochs, evaluated = [step["epoch"] for step in steps], [row["epoch"] for row in rows]
    figure = new_figure(13, 4)
    loss, accuracy, rate = figure.subplots(1, 3, sharex=True)
    if steps:
        losses = np.array([step["loss"] for step in steps])
        loss.plot(epochs, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        loss.plot(epochs, _smooth(losses), color="tab:blue", label="training, with augmentation")
    accuracy.grid(alpha=0.3)
    if rows:
        validation = [row["validation_loss"] for row in rows]
        loss.plot(evaluated, validation, color="tab:orange", marker=".", label="validation")
        main = next(name for name in _MAIN if all(name in row for row in rows))
        accuracy.set(title=f"validation {_MAIN[main]} (%)")
        top1 = [100 * row[main] for row in rows]
        balanced = [100 * row.get("validation_balanced_accuracy", math.nan) for row in rows]
        best = int(np.argmax([row["best"] * row["epoch"] for row in rows]))
        label = f"best: {top1[best]:.2f} % at epoch {evaluated[best]:.0f}"
        circle = {"color": "tab:green", "fillstyle": "none", "markersize": 10, "label": label}
        accuracy.plot(evaluated, top1, color="tab:orange", marker=".", clip_on=False)
        accuracy.plot(evaluated[best], top1[best], "o", clip_on=False, zorder=3, **circle)
        if np.ptp([top1, balanced], axis=0).max() > 0.01:  # in points: not of equal classes
            accuracy.plot(evaluated, balanced, color="tab:red", clip_on=False, label="balanced")
        accuracy.legend()
        lowest = np.nanmin([top1, balanced])
        accuracy.set_ylim(max(lowest - max(0.15 * (100 - lowest), 0.5), 0), 100)  # no margin above
    else:
        accuracy.set(title="validation accuracy (%)")
        accuracy.text(0.5, 0.5, "no validation images", ha="center", transform=accuracy.transAxes)
    if steps or rows:
        loss.legend()
    loss.set(title="loss", xlabel="epoch", yscale="log")
    plain, (low, high) = FuncFormatter(lambda value, _: f"{value:g}"), loss.get_ylim()
    loss.yaxis.set_major_formatter(plain)
    loss.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
    accuracy.set(xlabel="epoch")
    rate.plot(epochs, [step["learning_rate"] for step in steps], color="tab:gray")
    rate.set(title="learning rate", xlabel="epoch")
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the running mean over 1/50 of the values, same length as the input."""
    width = max(1, len(values) // 50)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def training_batch(
    inputs: Tensor, targets: Tensor, preprocessing: Preprocessing, class_names: list[str]
) -> Figure:
    """Returns the first images of an augmented batch, (N, channels, H, W), with their targets, (N,
    num_classes); the preprocessing is undone for the figure."""
    count = min(36, len(inputs))
    values = denormalize(inputs[:count], preprocessing)
    if preprocessing.kind == "arrays":
        images = [curve(row) for row in values.cpu().numpy()]
    else:
        images = values.mul(255).round().clamp(0, 255).byte().cpu().permute(0, 2, 3, 1).numpy()
    cells: list[Cell] = []
    for image, target in zip(images, targets, strict=False):
        weights, classes = target.topk(min(2, len(class_names)))
        parts = [
            shorten(class_names[index]) + (f" {weight:.0%}" if weight < 0.995 else "")
            for weight, index in zip(weights.tolist(), classes.tolist(), strict=True)
            if weight > 0.005
        ]
        cells.append((image, "\n".join(parts), ""))
    height, width = preprocessing.image_size
    title = f"the first training batch as the model sees it ({height}x{width} pixels)"
    return grid(cells, title)


# Data check


def save_check(
    splits: Mapping[str, Source], duplicates: Duplicates | None, folder: Path
) -> list[str]:
    """Writes samples.png and, if there are duplicates, duplicates.png; returns the file names."""
    figures = {"samples.png": samples(next(iter(splits.values())))}
    if duplicates is not None and len(duplicates):
        figures["duplicates.png"] = duplicate_pairs(duplicates)
    else:
        (folder / "duplicates.png").unlink(missing_ok=True)  # from an earlier check
    for name, figure in figures.items():
        save(figure, folder / name)
    return list(figures)


def samples(source: Source, seed: int = 0) -> Figure:
    """Returns random images of every class, or of some classes if there are very many."""
    present = np.flatnonzero(source.class_counts())
    per_class = next((n for n, most in ((6, 12), (3, 24), (2, 36)) if len(present) <= most), 1)
    chosen, classes = present, plural(len(present), "class")
    title = f"{source.name}: {plural(len(source), 'image')}, up to {per_class} of each of {classes}"
    if len(present) > _MAX_SAMPLES:
        chosen = present[np.linspace(0, len(present) - 1, _MAX_SAMPLES).round().astype(int)]
        title = f"{source.name}: one image of each of {_MAX_SAMPLES} out of {classes}"
    random = np.random.default_rng(seed)
    cells: list[Cell] = []
    for label in chosen:
        members = random.permutation(source.of_class(int(label)))[: 2 * per_class]  # with spares
        drawn = (thumbnail(source, int(index)) for index in members)
        found = list(islice((image for image in drawn if image is not None), per_class))
        captions = [shorten(source.class_names[label], 14), *[""] * (per_class - 1)]
        cells += [(image, text, "") for image, text in zip_longest(found, captions)]
    return grid(cells, title, columns=6 if per_class == 6 else 12)


def duplicate_pairs(duplicates: Duplicates) -> Figure:
    """Returns pairs of duplicates side by side, most different first."""
    cells = []
    pairs = islice(duplicates.most_different_first(), _MAX_PAIRS)
    for at, (first, second, kind, difference) in enumerate(pairs):
        kind = kind if difference == 0 else f"{kind} {difference:.3f}"
        for (split, index), last in ((first, kind), (second, " ")):
            source = duplicates.splits[split]
            caption = f"{escape(split)}[{index}]\n{shorten(source.label_text(index), 16)}\n{last}"
            cells.append((thumbnail(source, index), caption, _PAIR_COLORS[at % 2]))
    shown = min(len(duplicates), _MAX_PAIRS)
    title = f"{shown} of {len(duplicates):,} pairs of duplicates, the most different first"
    return grid(cells, title, columns=8)
