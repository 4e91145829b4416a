"""Draws the README's picture from a run on CIFAR-10.

python examples/readme_picture.py RUN --data 'cifar10_*.parquet' --output docs/images/mixer.png

RUN may be examples/cifar10_cpu.

Left, units of the first token-mixing MLP as `mixer inspect` draws them. Right, the run's weights at
twice their image size, on an image that is made of the first four test images of a class.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

import allmlp as am
from allmlp.data.image import decode
from allmlp.data.sources import open_source
from allmlp.inspection.figures import pair_panel
from allmlp.inspection.units import model_units
from allmlp.plots import GREEN, GREY, new_figure, save, show

COLUMNS, ROWS = 4, 5  # pairs of units
ACROSS = 2  # tiles per side
SHOWN = 4  # classes with a bar


def tiles_of(data: str, label: str) -> list[np.ndarray]:
    """The first images of a class, (H, W, 3)."""
    source = open_source(data)
    chosen = source.of_class(source.class_names.index(label))[: ACROSS**2]
    return [decode(source.read(index), source.item_name(index)) for index in chosen]


def draw_units(axes: list[Axes], model: am.MlpMixer) -> str:
    """Draws pairs of a unit and its nearest inverse; returns how many there are."""
    title, cells, captions = pair_panel(model_units(model).layers[0], most=COLUMNS * ROWS)
    for panel, cell, caption in zip(axes, cells, captions, strict=False):
        show(panel, cell)
        panel.set_frame_on(False)
        panel.set_xlabel(caption, fontsize=7, color="#555555", labelpad=2)
    return title


def draw_bars(axes: Axes, logits: torch.Tensor, names: tuple[str, ...]) -> None:
    top = logits.softmax(0).topk(SHOWN)
    places = range(SHOWN)[::-1]
    axes.barh(places, top.values, color=[GREEN] + [GREY] * (SHOWN - 1), height=0.6)
    axes.set_yticks(places, [names[index] for index in top.indices], fontsize=10)
    axes.tick_params(left=False)
    for place, value in zip(places, top.values.tolist(), strict=True):
        axes.text(value + 0.02, place, f"{value:.0%}", va="center", fontsize=10)
    axes.set_xlim(0, 1.2)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--label", default="ship")
    parser.add_argument("--output", type=Path, default=Path("docs/images/mixer.png"))
    given = parser.parse_args()

    small = am.load_model(given.run)
    side = small.config.image_size[0]
    large = am.load_model(given.run, image_size=ACROSS * side)
    tiles = tiles_of(given.data, given.label)
    rows = [np.concatenate(tiles[start : start + ACROSS], 1) for start in (0, ACROSS)]
    image = np.concatenate(rows, 0)
    with torch.no_grad():
        expected = small(torch.stack([small.transform(tile) for tile in tiles]))
        logits = large(large.transform(image)[None])[0]
    difference = (logits - expected.mean(0)).abs().max() / logits.abs().max()
    assert difference < 1e-5, difference

    figure = new_figure(9, 4.4, dpi=180)
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    title = draw_units(list(left.subplots(ROWS, COLUMNS).flat), small)
    left.suptitle(
        f"What token mixing has learned\n{title}, each a map over the patches", fontsize=11
    )
    top, bottom = right.subplots(2, 1, height_ratios=[2.4, 1])
    show(top, image)
    for number, votes in enumerate(expected.softmax(1)):
        row, column = divmod(number, ACROSS)
        words = f"{small.class_names[votes.argmax()]} {votes.max():.0%}"
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        top.text(column * side + 1, row * side + 2.5, words, fontsize=8, bbox=box)
    for line in range(1, ACROSS):
        top.axhline(line * side - 0.5, color="white", linewidth=1)
        top.axvline(line * side - 0.5, color="white", linewidth=1)
    draw_bars(bottom, logits, small.class_names)
    pixels = f"{ACROSS * side}\N{MULTIPLICATION SIGN}{ACROSS * side}"
    small_pixels = f"{side}\N{MULTIPLICATION SIGN}{side}"
    right.suptitle(
        f"{pixels} pixels with weights trained at {small_pixels}\n"
        f"the logits are the mean over the tiles, within {difference:.0e}",
        fontsize=11,
    )
    save(figure, given.output)
    print(f"wrote {given.output}, {given.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
