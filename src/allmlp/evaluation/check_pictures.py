"""Pictures of a data set: samples of every class, and duplicates side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from allmlp.data.duplicates import Duplicates
from allmlp.data.image import decode
from allmlp.data.items import Source
from allmlp.errors import UserError, plural
from allmlp.evaluation.pictures import as_drawn, save_figure, shorten

MOST_PAIRS = 24
_CELLS = 72  # images in the grid of samples
_SIDE = 128  # pixels that the longer side of an image gets


def save_pictures(
    splits: Mapping[str, Source], duplicates: Duplicates | None, folder: Path
) -> list[str]:
    """Writes samples.png and, where there are any, duplicates.png; returns their names."""
    figures = {"samples.png": samples(next(iter(splits.values())))}
    if duplicates is not None and len(duplicates):
        figures["duplicates.png"] = duplicate_pairs(duplicates)
    else:
        (folder / "duplicates.png").unlink(missing_ok=True)  # of an earlier check
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return list(figures)


def samples(source: Source, seed: int = 0) -> Figure:
    """Returns images drawn from every class; of very many classes, from some, as the title says.

    Args:
        source: the data.
        seed: of the draw.
    """
    present = np.unique(source.labels)
    each = next((n for n, most in ((6, 12), (3, 24), (2, 36)) if len(present) <= most), 1)
    chosen = present
    if len(present) > _CELLS:
        chosen = present[np.linspace(0, len(present) - 1, _CELLS).round().astype(int)]
    columns = 6 if each == 6 else 12
    random = np.random.default_rng(seed)
    classes = plural(len(present), "class")
    title = f"{source.name}: {plural(len(source), 'image')}, up to {each} of each of {classes}"
    if len(chosen) < len(present):
        title = f"{source.name}: an image of each of {len(chosen)} out of {classes}"
    cells: list[tuple[np.ndarray | None, str]] = []
    for label in chosen:
        members = random.permutation(np.flatnonzero(source.labels == label))
        found: list[np.ndarray | None] = []
        for index in members[: 2 * each]:  # beyond those that cannot be decoded
            picture = _small(source, int(index)) if len(found) < each else None
            if picture is not None:
                found.append(picture)
        name = shorten(source.class_names[label], 14)
        captions = [name, *[""] * (each - 1)]
        cells += zip([*found, *[None] * (each - len(found))], captions, strict=True)
    return _grid(cells, columns, title)


def duplicate_pairs(duplicates: Duplicates) -> Figure:
    """Returns pairs of duplicates side by side, the most different first."""
    order = duplicates.most_different_first()[:MOST_PAIRS]
    cells: list[tuple[np.ndarray | None, str]] = []
    for number in order:
        pair = duplicates.pair(int(number))
        what = pair.kind if pair.difference == 0 else f"{pair.kind} {pair.difference:.3f}"
        for (split, index), last in ((pair.first, what), (pair.second, " ")):
            source = duplicates.splits[split]
            name = shorten(source.class_names[int(source.labels[index])], 16)
            cells.append((_small(source, index), f"{as_drawn(split)}[{index}]\n{name}\n{last}"))
    title = f"duplicates, pair by pair: {len(duplicates):,}; the most different first"
    if len(order) < len(duplicates):
        title += f", {len(order)} of them"
    return _grid(cells, 8, title, pairs=True)


def _grid(
    cells: list[tuple[np.ndarray | None, str]], columns: int, title: str, *, pairs: bool = False
) -> Figure:
    """Images with captions, row by row; an empty cell where there is no image."""
    columns = min(columns, len(cells))
    rows = math.ceil(len(cells) / columns)
    lines = max(caption.count("\n") + 1 for _, caption in cells)
    size = (max(1.25 * columns, 6.0), (1.25 + 0.13 * lines) * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(as_drawn(title), fontsize=10)
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for number, axes in enumerate(panels):
        picture, caption = cells[number] if number < len(cells) else (None, "")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(caption, fontsize=7, loc="left")
        if picture is None:
            axes.set_axis_off()
            continue
        axes.imshow(picture, interpolation="nearest")
        color = ("#0969da", "#bc4c00")[number // 2 % 2] if pairs else "#888888"
        for spine in axes.spines.values():
            spine.set_color(color)
            spine.set_linewidth(1.5 if pairs else 0.8)
    return figure


def _small(source: Source, index: int) -> np.ndarray | None:
    """The image, no side longer than `_SIDE`, uint8 (H, W, 3); None if it is unreadable."""
    try:
        pixels = decode(source.read(index), source.item_name(index))
    except UserError:
        return None
    height, width = pixels.shape[:2]
    scale = _SIDE / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
