"""The pictures: drawn for few and many classes, few and many images, and what their titles say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import allmlp as am
from allmlp.data.items import EncodedImages
from allmlp.errors import plural
from allmlp.evaluation import pictures
from conftest import draw, encode

pytestmark = pytest.mark.usefixtures("real_pictures")


def evaluation(classes: int, images: int, wrong: int) -> tuple[am.Evaluation, EncodedImages]:
    names = [f"a rather long name of class {number}" for number in range(classes)]
    labels = np.arange(images) % classes
    predicted = labels.copy()
    predicted[:wrong] = (predicted[:wrong] + 1) % classes
    probabilities = np.full((images, classes), 0.1 / classes, np.float32)
    probabilities[np.arange(images), predicted] += np.linspace(0.9, 0.6, images)
    files = [encode(draw(number, (20 + number % 7, 24))) for number in range(images)]
    source = EncodedImages("drawn", names, labels, files, "drawn")
    return am.Evaluation("drawn", names, labels, np.arange(images), probabilities), source


def is_drawn(figure: Figure, path: Path) -> None:
    pictures.save_figure(figure, path)
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.std() > 5
    assert not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize("classes", [2, 10, 34, 130])
def test_confusion(classes: int, tmp_path: Path):
    result, _ = evaluation(classes, 2 * classes, 1)
    figure = pictures.confusion_matrix(result)
    axes = figure.axes[0]
    assert f"of {2 * classes} images right" in axes.get_title()
    assert len(axes.texts) == ((classes + 1) if classes <= 20 else 0)
    assert len(axes.get_xticks()) <= 65
    is_drawn(figure, tmp_path / "confusion.png")


@pytest.mark.parametrize("images", [1, 50])
def test_reliability_diagram(images: int, tmp_path: Path):
    result, _ = evaluation(3, images, 1)
    figure = pictures.reliability_diagram(result)
    upper, lower = figure.axes
    error = result.reliability.error
    assert f"expected calibration error {error:.2%}, {plural(images, 'image')}" in upper.get_title()
    heights = [patch.get_height() for patch in lower.patches]  # pyright: ignore
    assert heights == result.reliability.images.tolist()
    is_drawn(figure, tmp_path / "reliability.png")


@pytest.mark.parametrize("images", [1, 2, 5, 50])
def test_prediction_grid(images: int, tmp_path: Path):
    result, source = evaluation(3, images, 1)
    figure = pictures.prediction_grid(result, source)
    shown = [axes for axes in figure.axes if axes.get_title()]
    assert len(shown) == min(images, 36)
    assert f"{min(images, 36) - 1} right (green), 1 wrong (red)" in figure.get_suptitle()
    assert "true: " in shown[0].get_title()
    is_drawn(figure, tmp_path / "grid.png")


def test_worst_mistakes_first():
    result, source = evaluation(3, 40, 30)
    figure = pictures.worst_mistakes(result, source)
    assert figure.get_suptitle() == "drawn: 30 mistakes of 40, the worst first"
    captions = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(captions) == 25
    assert all("true: " in caption for caption in captions)


def test_no_mistakes():
    result, source = evaluation(3, 10, 0)
    figure = pictures.worst_mistakes(result, source)
    assert "no mistakes of 10; the least certain first" in figure.get_suptitle()


def test_names_are_cut_in_the_middle():
    assert pictures.shorten("short") == "short"
    assert pictures.shorten("abcdefghijklmnopqrstuvwxyz", 10) == "abcd..wxyz"
