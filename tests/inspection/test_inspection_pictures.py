"""The figures: every weight is a square of whole pixels, and a vector file holds the same."""

from __future__ import annotations

import base64
import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from allmlp.inspection import image_pictures, pictures
from allmlp.inspection.attribution import Occlusion, UnitResponse
from allmlp.inspection.units import pair_opposites


def pixels_of(figure: Figure, folder: Path) -> np.ndarray:
    pictures.save_figure(figure, folder / "figure", "png")
    return np.asarray(Image.open(folder / "figure").convert("RGB"))


def embedded(path: Path) -> np.ndarray:
    found = re.findall(r'xlink:href="data:image/png;base64,\s*([^"]+)"', path.read_text())
    assert len(found) == 1
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[0]))).convert("RGB"))


def contains(pixels: np.ndarray, part: np.ndarray) -> bool:
    """Whether the picture has this part somewhere, to the last bit."""
    height, width = part.shape[:2]
    views = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], width, axis=1)
    for y, x in np.argwhere((views == part[0, :, 0]).all(axis=2)):
        if np.array_equal(pixels[y : y + height, x : x + width], part):
            return True
    return False


def test_colours_are_symmetric_about_zero():
    unit = np.array([[-2.0, 0.0, 2.0, 1.0]])
    low, middle, high, half = pictures.unit_pixels(unit)[0].astype(int)
    assert low[2] > low[0]  # blue
    assert high[0] > high[2]  # red
    assert middle.min() > 240  # white
    assert middle.max() - middle.min() < 6
    assert half[0] > half[2] > high[2]
    assert np.array_equal(pictures.unit_pixels(unit), pictures.unit_pixels(unit * 1e-9))
    assert len(np.unique(pictures.unit_pixels(np.zeros((2, 2))).reshape(-1, 3), axis=0)) == 1


def test_colour_units():
    unit = np.zeros((2, 2, 3))
    unit[0, 0] = [1.0, -1.0, 0.0]
    drawn = pictures.color_pixels(unit)
    assert drawn[0, 0].tolist() == [255, 0, 128]
    assert drawn[1, 1].tolist() == [128, 128, 128]
    grey = pictures.color_pixels(unit[..., :1])
    assert grey.shape == (2, 2, 3)
    assert grey[0, 0].tolist() == [255, 255, 255]


def test_pairs_are_chosen_evenly_and_whole():
    assert pictures.choose_pairs(6, 9).tolist() == [0, 1, 2, 3, 4, 5]
    assert pictures.choose_pairs(20, 3).tolist() == [0, 1, 8, 9, 18, 19]
    assert pictures.choose_pairs(5, 2).tolist() == [0, 1, 4]
    assert pictures.choose_pairs(1, 1).tolist() == [0]


@pytest.mark.parametrize(
    ("grid", "count"), [((8, 8), 1), ((4, 12), 40), ((14, 14), 5), ((9, 2), 2), ((96, 96), 3)]
)
def test_pair_figure(grid, count, tmp_path):
    units = np.random.default_rng(0).normal(size=(count, *grid))
    order = pair_opposites(units)
    panel = pictures.layer_panel("Layer 1", units, order, 8)
    shown = min(count, 16)
    assert len(panel.units) == shown
    assert len(panel.correlations) == shown // 2
    figure = pictures.pair_figure([panel, panel], "a title", columns=4, numbered=True)
    drawn = pixels_of(figure, tmp_path)
    factor = max(1, round(80 / max(grid)))
    for unit in (panel.units[0], panel.units[-1]):
        assert contains(drawn, pictures.enlarge(pictures.unit_pixels(unit), factor))
    texts = [text.get_text() for text in figure.axes[0].texts]
    if count >= 2:
        assert texts.count(f"{panel.correlations[0]:+.2f}".replace("-", "\N{MINUS SIGN}")) >= 2
    assert texts.count(str(order[0] + 1)) >= 2  # numbers count from 1


def test_texts_stay_on_the_sheet_and_apart(tmp_path):
    units = np.random.default_rng(0).normal(size=(300, 3, 12))
    panel = pictures.layer_panel("Layer 12", units, pair_opposites(units))
    for columns, numbered in ((4, False), (10, True)):
        figure = pictures.pair_figure(
            [panel],
            "a long title of a model whose path is long " * 3,
            columns=columns,
            numbered=numbered,
        )
        figure.savefig(tmp_path / "a.png")
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
        width, height = figure.get_size_inches() * figure.dpi
        for box in boxes:
            assert box.x0 >= 0
            assert box.x1 <= width
            assert box.y0 >= 0
            assert box.y1 <= height
        row = sorted((round(box.y1), box.x0, box.x1) for box in boxes)
        for (y, _, end), (other_y, start, _) in itertools.pairwise(row):
            assert y != other_y or end <= start + 1


@pytest.mark.parametrize("shape", [(4, 4, 3), (16, 16, 3), (7, 3, 1)])
def test_colour_figure(shape, tmp_path):
    units = np.random.default_rng(0).normal(size=(33, *shape))
    drawn = pixels_of(pictures.color_figure(units, "title", "what it is " * 9), tmp_path)
    factor = round(64 / max(shape))
    for unit in (units[0], units[-1]):
        assert contains(drawn, pictures.enlarge(pictures.color_pixels(unit), factor))


def test_vector_files_hold_the_same_pixels(tmp_path):
    units = np.random.default_rng(0).normal(size=(6, 5, 5))
    panel = pictures.layer_panel("Layer 1", units, pair_opposites(units))
    figure = pictures.pair_figure([panel], "title", columns=4)
    pictures.save_figure(figure, tmp_path / "a", "svg")
    inside = embedded(tmp_path / "a")
    for unit in panel.units:
        assert contains(inside, pictures.enlarge(pictures.unit_pixels(unit), 16))
    assert "image-rendering:pixelated" in (tmp_path / "a").read_text()
    pictures.save_figure(figure, tmp_path / "b", "pdf")
    assert (tmp_path / "b").read_bytes().startswith(b"%PDF")
    for kind in ("svg", "pdf", "png"):
        pictures.save_figure(figure, tmp_path / "first", kind)
        pictures.save_figure(figure, tmp_path / "second", kind)
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_blend_shades_the_map_with_the_image():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, 3:] = 255
    values = np.array([[1.0, 1.0], [-1.0, -1.0]])
    drawn = image_pictures.blend(pixels, values, 1.0)
    assert drawn.shape == (4, 6, 3)
    assert (drawn[:2, :, 0] > drawn[:2, :, 2]).all()
    assert (drawn[2:, :, 0] < drawn[2:, :, 2]).all()
    assert drawn[0, 5].sum() > drawn[0, 0].sum()


def test_occlusion_figure(tmp_path):
    drop = np.array([[0.0, 0.2, -0.1]])
    places = np.zeros((1, 3, 2), np.int64)
    result = Occlusion(1, "$cat$", 0.875, drop, places, drop, 1, 1)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 24, 3)).astype(np.uint8)
    figure = image_pictures.occlusion_figure(pixels, result, "photo.jpg")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == r"predicted: \$cat\$, 87.5%"
    assert "1x1 patches, stride 1" in titles[1]
    assert figure.axes[3].get_ylim() == pytest.approx((-20, 20))  # the colour bar
    assert pixels_of(figure, tmp_path).std() > 20


@pytest.mark.parametrize("has_written", [True, False])
def test_response_figure(has_written, tmp_path):
    random = np.random.default_rng(0)
    responses = [
        UnitResponse(
            layer,
            unit,
            *random.normal(size=(2, 3, 2)),
            random.random((3, 2)) if has_written else None,
            1.0,
        )
        for layer, unit in ((1, 0), (1, 6), (3, 2))
    ]
    pixels = random.integers(0, 255, (12, 8, 1)).astype(np.uint8)
    figure = image_pictures.response_figure(pixels, responses, "photo.jpg")
    assert [part.get_suptitle() for part in figure.subfigs[1:]] == ["layer 1", "layer 3"]
    labels = [axes.get_ylabel() for part in figure.subfigs for axes in part.axes]
    assert [each for each in labels if each] == ["unit 1", "unit 7", "unit 3"]
    assert pixels_of(figure, tmp_path).std() > 20
