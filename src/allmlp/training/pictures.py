"""Pictures of a training: the curves, and a batch as the model saw it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image
from torch import Tensor

from allmlp.data.transforms import denormalize
from allmlp.evaluation.pictures import image_grid, shorten
from allmlp.preprocessing import Preprocessing
from allmlp.training.run_folder import read_metrics, read_results


def curves(run: Path) -> Figure:
    """Returns loss, accuracy and learning rate over the epochs, read from the run's own files."""
    needed = {"epoch", "loss", "learning_rate"}
    steps = [each for each in read_metrics(run) if needed <= each.keys()]
    # There are none without validation images.
    results = [{key: float(value) for key, value in row.items()} for row in read_results(run)]
    epochs = np.array([step["epoch"] for step in steps])
    losses = np.array([step["loss"] for step in steps])
    evaluated = [row["epoch"] for row in results]
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    loss.plot(epochs, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    if steps:  # a damaged log may have none
        loss.plot(epochs, smooth(losses), color="tab:blue", label="training, with augmentation")
    loss.set(title="loss", xlabel="epoch", yscale="log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    loss.yaxis.set_major_formatter(plain)
    accuracy.set(title="validation accuracy (%)", xlabel="epoch")
    accuracy.grid(alpha=0.3)
    if results:
        validation = [row["validation_loss"] for row in results]
        loss.plot(evaluated, validation, color="tab:orange", marker=".", label="validation")
        top1 = [100 * row["validation_top1"] for row in results]
        best = int(np.argmax([row["best"] * row["epoch"] for row in results]))
        label = f"best: {top1[best]:.2f} % at epoch {evaluated[best]:.0f}"
        circle = {"color": "tab:green", "fillstyle": "none", "markersize": 10, "label": label}
        accuracy.plot(evaluated, top1, color="tab:orange", marker=".")
        accuracy.plot(evaluated[best], top1[best], "o", **circle)
        accuracy.legend(loc="lower right")
    else:
        accuracy.text(0.5, 0.5, "no validation images", ha="center", transform=accuracy.transAxes)
    low, high = loss.get_ylim()
    loss.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
    if steps or results:
        loss.legend()
    rate.plot(epochs, [step["learning_rate"] for step in steps], color="tab:gray")
    rate.set(title="learning rate", xlabel="epoch")
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Returns the running mean over a fiftieth of the values, as long as the input."""
    width = max(1, len(values) // 50)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def training_batch(
    inputs: Tensor, targets: Tensor, preprocessing: Preprocessing, class_names: list[str]
) -> Figure:
    """Returns the first images of a batch after every augmentation, with their targets.

    Args:
        inputs: (N, channels, H, W), as they went into the model.
        targets: (N, num_classes), as they went into the loss.
        preprocessing: which is undone for the picture.
        class_names: of the targets.
    """
    count = min(36, len(inputs))
    values = denormalize(inputs[:count], preprocessing)
    pixels = values.mul(255).round().clamp(0, 255).byte().cpu().permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(each[..., 0] if each.shape[2] == 1 else each) for each in pixels]
    captions = []
    for target in targets[:count]:
        shares, classes = target.topk(min(2, len(class_names)))
        parts = [
            shorten(class_names[int(c)]) + (f" {s:.0%}" if s < 0.995 else "")
            for s, c in zip(shares.tolist(), classes.tolist(), strict=True)
            if s > 0.005
        ]
        captions.append("\n".join(parts))
    height, width = preprocessing.image_size
    title = f"the first training batch as the model saw it ({height}x{width} pixels)"
    return image_grid(images, captions, title)
