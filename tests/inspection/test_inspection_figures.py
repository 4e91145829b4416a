"""The figures: every weight is a square of whole pixels, and a vector file holds the same."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from allmlp import plots
from allmlp.inspection import figures
from allmlp.inspection.attribution import Occlusion, UnitResponse
from allmlp.inspection.units import TokenMixingLayer, pair_opposites


def pixels_of(figure: Figure, path: Path) -> np.ndarray:
    plots.writer(figure, "png")(path)
    return np.asarray(Image.open(path).convert("RGB"))


def contains(pixels: np.ndarray, part: np.ndarray) -> bool:
    """Whether the image has this part somewhere, to the last bit."""
    height, width = part.shape[:2]
    views = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], width, axis=1)
    return any(
        np.array_equal(pixels[y : y + height, x : x + width], part)
        for y, x in np.argwhere((views == part[0, :, 0]).all(axis=2))
    )


def enlarged(pixels: np.ndarray, factor: int) -> np.ndarray:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def test_colours_are_symmetric_about_zero():
    unit = np.array([[-2.0, 0.0, 2.0, 1.0]])
    low, middle, high, half = figures.unit_pixels(unit)[0].astype(int)
    assert low[2] > low[0]  # blue
    assert high[0] > high[2]  # red
    assert middle.min() > 240  # white
    assert half[0] > half[2] > high[2]
    assert np.array_equal(figures.unit_pixels(unit), figures.unit_pixels(unit * 1e-9))
    assert len(np.unique(figures.unit_pixels(np.zeros((2, 2))).reshape(-1, 3), axis=0)) == 1
    unit = np.zeros((2, 2, 3))
    unit[0, 0] = [1.0, -1.0, 0.0]
    assert figures.color_pixels(unit)[:, 0].tolist() == [[255, 0, 128], [128] * 3]
    assert figures.color_pixels(unit[..., :1])[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize(("grid", "count"), [((8, 8), 1), ((4, 12), 40), ((96, 96), 3)])
def test_pairs(grid, count, tmp_path):
    units = np.random.default_rng(0).normal(size=(count, *grid))
    order = pair_opposites(units)
    layer = TokenMixingLayer(1, "blocks.0", units, None)
    panel = figures.pair_panel(layer, most=8, numbered=True)
    title, cells, captions = panel
    assert len(cells) == len(captions) == min((count + 1) // 2, 8)
    assert ("8 of 20 pairs" in title) == (count == 40)
    figure = figures.pair_page("a model" * 20, [panel, panel], 4)
    factor = max(1, round(80 / max(grid)))
    drawn = pixels_of(figure, tmp_path / "a")
    for unit in order[[0, -1]]:  # the first pair and the last are always shown
        assert contains(drawn, enlarged(figures.unit_pixels(units[unit]), factor))
    assert captions[0].split()[0] == str(order[0] + 1)  # numbers count from 1
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(box.x0 >= 0 and box.x1 <= width for box in boxes)
    assert all(box.y0 >= 0 and box.y1 <= height for box in boxes)
    for at, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:at])


@pytest.mark.parametrize("shape", [(16, 16, 3), (7, 3, 1)])
def test_stem(shape, tmp_path):
    units = np.random.default_rng(0).normal(size=(33, *shape))
    drawn = pixels_of(figures.stem_page("name", units), tmp_path / "a")
    for unit in (units[0], units[-1]):
        assert contains(drawn, enlarged(figures.color_pixels(unit), round(64 / max(shape))))


def test_svg_files_hold_the_same_pixels_and_are_reproducible(tmp_path):
    units = np.random.default_rng(0).normal(size=(6, 5, 5))
    panel = figures.pair_panel(TokenMixingLayer(1, "blocks.0", units, None))
    figure = figures.pair_page("name", [panel], 4)
    for name in ("first", "second"):
        plots.writer(figure, "svg")(tmp_path / f"{name}.svg")
    text = (tmp_path / "first.svg").read_text()
    assert (tmp_path / "second.svg").read_text() == text
    assert "image-rendering:pixelated" in text
    (data,) = re.findall(r'xlink:href="data:image/png;base64,\s*([^"]+)"', text)
    inside = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    for unit in units:
        assert contains(inside, enlarged(figures.unit_pixels(unit), 16))


def test_occlusion_and_responses(tmp_path):
    random = np.random.default_rng(0)
    drop = np.array([[0.0, 0.2, -0.1]])
    result = Occlusion(1, "$cat$", 0.875, drop, np.zeros((1, 3, 2), np.int64), drop, 1)
    pixels = random.integers(0, 255, (8, 24, 3)).astype(np.uint8)
    figure = figures.occlusion_figure(pixels, result, "photo.jpg")
    assert figure.axes[0].get_title() == r"predicted: \$cat\$, 87.5%"
    assert figure.axes[3].get_ylim() == pytest.approx((-20, 20))  # the colour bar
    assert pixels_of(figure, tmp_path / "a").std() > 20
    maps = random.random((2, 3, 2))
    responses = [
        UnitResponse(layer, unit, *maps, written, 1.0)
        for layer, unit, written in ((1, 0, None), (1, 6, maps[0]), (3, 2, maps[0]))
    ]
    figure = figures.response_figure(pixels[..., :1], responses, "photo.jpg")
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == ["unit 1", "unit 7", "unit 3"]
    assert pixels_of(figure, tmp_path / "a").std() > 20
