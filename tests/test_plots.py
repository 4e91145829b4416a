"""The figures of training, evaluation and data check: for few and many classes and images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import allmlp as am
from allmlp import plots
from allmlp.data.source import EncodedImages, Source, labelled
from allmlp.data.sources import open_splits
from allmlp.evaluation import metrics
from conftest import draw, encode, make_class_folder

pytestmark = pytest.mark.usefixtures("real_figures")


def evaluation(classes: int, images: int, wrong: int) -> tuple[am.Evaluation, Source]:
    names = [f"a rather long name of class {number}" for number in range(classes)]
    labels = np.arange(images) % classes
    predicted = labels.copy()
    predicted[:wrong] = (predicted[:wrong] + 1) % classes
    probabilities = np.full((images, classes), 0.1 / classes, np.float32)
    probabilities[np.arange(images), predicted] += np.linspace(0.9, 0.6, images)
    files = [encode(draw(number, (20 + number % 7, 24))) for number in range(images)]
    source = labelled(EncodedImages(files, "drawn"), "drawn", names, labels)
    return am.Evaluation("drawn", names, labels, np.arange(images), np.log(probabilities)), source


def check_drawn(figure: Figure, folder: Path) -> None:
    plots.save(figure, folder / "figure.png")
    assert np.asarray(Image.open(folder / "figure.png").convert("L")).std() > 5
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("classes", [10, 130])
def test_confusion_matrix(classes: int, tmp_path: Path):
    figure = plots.confusion_matrix(evaluation(classes, 2 * classes, 1)[0])
    axes = figure.axes[0]
    assert len(axes.texts) == ((classes + 1) if classes <= 20 else 0)
    assert len(axes.get_xticks()) <= 65
    check_drawn(figure, tmp_path)


@pytest.mark.parametrize("images", [1, 50])
def test_figures_of_an_evaluation(images: int, tmp_path: Path):
    result, source = evaluation(3, images, 1)
    figure = plots.reliability_diagram(result)
    heights = [patch.get_height() for patch in figure.axes[1].patches]
    assert heights == result.reliability.images.tolist()
    check_drawn(figure, tmp_path)
    figure = plots.prediction_grid(result, source)
    shown = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert (len(shown), "true: " in shown[0]) == (min(images, 36), True)
    check_drawn(figure, tmp_path)


def test_a_report_has_no_confusion_matrix_of_an_earlier_evaluation(tmp_path, monkeypatch):
    result, source = evaluation(3, 3, 1)
    for most, there in ((3, ["confusion.csv", "confusion.png"]), (2, [])):
        monkeypatch.setattr(metrics, "MOST_CONFUSED", most)
        result.save(tmp_path, overwrite=True)
        plots.save_evaluation(result, source, tmp_path)
        assert sorted(path.name for path in tmp_path.glob("confusion*")) == there


@pytest.mark.parametrize(("images", "wrong", "shown"), [(40, 30, 25), (10, 0, 10)])
def test_worst_mistakes(images: int, wrong: int, shown: int):
    figure = plots.worst_mistakes(*evaluation(3, images, wrong))
    captions = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(captions) == shown
    assert all(("true: " in caption) == bool(wrong) for caption in captions)


def results(*accuracies: float) -> list[dict[str, float]]:
    known = {"validation_loss": 1.0, "best": 1}
    return [{"epoch": at, "validation_top1": top1, **known} for at, top1 in enumerate(accuracies)]


@pytest.mark.parametrize("accuracies", [(0.02,), (0.3, 1.0, 0.9), ()])
def test_curves(accuracies: tuple[float, ...], tmp_path: Path):
    metrics = [{"epoch": at, "loss": 2.0 - at, "learning_rate": 0.1} for at in range(2)]
    steps = [*metrics, {"epoch": 2}] if accuracies else []
    figure = plots.curves(steps, results(*accuracies))
    if accuracies:
        low, high = figure.axes[1].get_ylim()
        assert (low < 100 * min(accuracies), high) == (True, 100)
    check_drawn(figure, tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
def test_training_batch(channels: int, tmp_path: Path):
    rules = am.Preprocessing(image_size=(8, 8), channels=channels)
    targets = torch.tensor([[1.0, 0.0], [0.3, 0.7]])
    figure = plots.training_batch(torch.zeros(2, channels, 8, 8), targets, rules, ["ant", "bee"])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["ant", "bee 70%\nant 30%"]
    check_drawn(figure, tmp_path)


def test_samples(tmp_path: Path):
    few = make_class_folder(tmp_path / "few", {"ant": 2, "bee": 9})
    (few / "ant/cut.png").write_bytes(encode(draw(0))[:99])
    figure = plots.samples(open_splits(str(few))["train"])
    assert sum(1 for axes in figure.axes if axes.images) == 8
    check_drawn(figure, tmp_path)
    many = make_class_folder(tmp_path / "many", {f"class{n}": 1 for n in range(80)})
    figure = plots.samples(open_splits(str(many))["train"])
    assert "72 out of 80 classes" in figure.get_suptitle()


def test_names_of_any_script_draw_without_a_warning(tmp_path: Path):
    figure = plots.new_figure(2, 2)
    figure.subplots().set_title("\u732b \u0915 \uac00")
    plots.save(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0
