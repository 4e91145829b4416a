"""report.html: what a run or an evaluation has found, on one page that opens without a network."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from allmlp import plots
from allmlp.data.source import Source
from allmlp.errors import plural
from allmlp.evaluation.metrics import Evaluation
from allmlp.io import atomic_write
from allmlp.models.layers import Classifier, flops_text, preprocessing_of
from allmlp.page import details, image, items, page, table, tag
from allmlp.training.config import TrainConfig
from allmlp.training.fit import are_too_few
from allmlp.training.recipes import RECIPES, recipe
from allmlp.training.run_folder import identity, read_results
from allmlp.training.state import Run

REPORT = "report.html"
_MAX_MISTAKES, _MAX_CLASSES = 24, 30
_ENOUGH = 20  # training images of a class


def run_report(
    run: Run,
    model: Classifier,
    validation: Evaluation | None,
    test: Evaluation | None,
    commands: Sequence[tuple[str, str]],
) -> None:
    """Writes the report of a run; `commands` are what to do next: purpose, command."""
    config, splits, folder = run.config, run.splits, run.folder
    shown, source = (test, splits.test) if test is not None else (validation, splits.validation)
    parts = [tag("h1", f"{folder.path.absolute().name}: {config.recipe} on {config.data.source}")]
    if shown is None:
        parts.append(tag("p", "All images were trained on, none are left to measure the accuracy."))
    else:
        which = "test images, which the training has never seen"
        if test is None:
            which = "validation images, by which the weights were chosen: expect less on new ones"
        parts += _accuracy(shown, which)
        if test is not None and validation is not None:
            parts.append(tag("p", f"On the validation images: {validation.summary()}."))
    parts.append(items([*_concerns(run, model), *(shown.warnings() if shown else [])], "warning"))
    parts.append(_figure(folder.plots, "curves", "Loss, accuracy and learning rate"))
    rows = [("data", line) for line in splits.describe()]
    rows += [("model", _described(model))]
    if config.model.weights is not None:
        rows.append(("begins with", config.model.weights))
    length = f"{config.length}, batch {config.batch_size}"
    length = "linear probe" if config.model.train_only == "probe" else length
    rows.append(("run", f"{length}, seed {config.seed}"))
    rows += [("not as in the recipe", f"{key} = {value}") for key, value in _changed(config)]
    parts += [tag("h2", "The run"), table(rows)]
    if shown is not None and source is not None:
        parts += _evaluation(shown, source, folder.plots)
    parts.append(
        details("A training batch as the model sees it", _figure(folder.plots, "train_batch", ""))
    )
    parts.append(tag("h2", "What to do next"))
    for purpose, command in commands:
        parts += [tag("p", purpose), tag("pre", command)]
    if run.folder.writes:
        atomic_write(folder.path / REPORT, page(f"{folder.path.name}: report", parts))


def evaluation_report(model: Classifier, result: Evaluation, source: Source, folder: Path) -> None:
    """Writes the report of an evaluation beside its figures."""
    which = "held-out images of its run" if result.are_held_out else "images"
    parts = [
        tag("h1", f"{model.source or 'A model'} on {result.data}"),
        *_accuracy(result, which),
        items(result.warnings(), "warning"),
        table([("model", _described(model)), ("input", preprocessing_of(model).summary())]),
        *_evaluation(result, source, folder),
    ]
    atomic_write(folder / REPORT, page(f"Report on {result.data}", parts))


def _accuracy(result: Evaluation, which: str) -> list[str]:
    on = f"On {len(result.labels):,} {which} ({result.data})."
    return [tag("p", result.summary(), "large"), tag("p", on), items(result.lines())]


def _described(model: Classifier) -> str:
    height, width = model.config.image_size
    cost = f"{model.num_parameters:,} parameters, {flops_text(model.config.flops)} per image"
    return f"{model.config.summary()}, {height}x{width} pixels: {cost}"


def _evaluation(result: Evaluation, source: Source, folder: Path) -> Iterable[str]:
    """Yields classes, confusions, figures and the worst mistakes."""
    rows = [row for row in result.per_class() if row["images"]]
    rows.sort(key=lambda row: row["recall"])
    cells = [[_cell(value) for value in row.values()] for row in rows]
    whole = table(cells, list(rows[0]))
    yield tag("h2", "Classes, the worst first")
    yield whole if len(rows) <= _MAX_CLASSES else table(cells[:_MAX_CLASSES], list(rows[0]))
    if len(rows) > _MAX_CLASSES:
        yield details(f"All {len(rows)} classes", whole)
    if pairs := result.worst_confusions(10):
        yield tag("h2", "Most often confused")
        yield table([(true, taken, f"{count}") for true, taken, count in pairs],
                    ("true class", "predicted", "images"))  # fmt: skip
    yield _figure(folder, "confusion", "Confusion matrix")
    wrong = result.mistakes()
    yield tag("h2", f"Worst mistakes ({plural(len(wrong), 'mistake')} in all)")
    yield tag("p", "Those whose true class seemed least likely come first. Look for wrong labels.")
    yield f'<div class="images">{"".join(_mistakes(result, source, wrong))}</div>'
    figures = (_figure(folder, name, name) for name in ("reliability", "predictions"))
    yield details("Calibration, and a sample of the predictions", "".join(figures))


def _mistakes(result: Evaluation, source: Source, wrong: np.ndarray) -> Iterable[str]:
    for row in wrong[:_MAX_MISTAKES]:
        index = int(result.indices[row])
        small = plots.thumbnail(source, index)
        true = source.label_text(index) or "none"
        picture = ""
        if small is not None:
            file = io.BytesIO()
            Image.fromarray(small).convert("RGB").save(file, "JPEG", quality=85)
            picture = image(file.getvalue(), true, "jpeg")
        predicted = result.predicted(int(row))
        said = ", ".join(f"{name} {value:.0%}" for name, value in predicted) or "none"
        lines = f"{tag('b', said)}<br>{tag('span', f'true: {true}')}"
        name = tag("small", source.item_name(index))
        yield f"<figure>{picture}<figcaption>{lines}<br>{name}</figcaption></figure>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _figure(folder: Path, name: str, described: str) -> str:
    path = folder / f"{name}.png"
    return f"<p>{image(path, described)}</p>" if path.is_file() else ""


def _changed(config: TrainConfig) -> list[tuple[str, Any]]:
    """The settings that differ from the recipe's."""
    if config.recipe not in RECIPES:
        return []
    own, usual = identity(config), identity(recipe(config.recipe))
    return [
        (key, value)
        for key, value in own.items()
        if value != usual.get(key) and key not in ("data.source", "model.weights")  # named above
    ]


def _concerns(run: Run, model: Classifier) -> Iterable[str]:
    """Yields what the numbers mean, in words."""
    train = run.splits.train
    counts = train.class_counts()
    few = [f"{train.class_names[at]} ({counts[at]})" for at in np.flatnonzero(counts < _ENOUGH)]
    if few:
        more = f" and {len(few) - 8} more" if len(few) > 8 else ""
        yield f"few training images, fewer than {_ENOUGH}: {', '.join(few[:8])}{more}"
    if are_too_few(run.config, model.num_parameters, len(train)):
        yield (
            f"{len(train):,} images are few for random weights: begin with trained ones "
            "(mixer finetune CHECKPOINT --data FOLDER)"
        )
    try:
        rows = [
            [float(row[f"{name}_loss"]) for name in ("training", "validation")]
            for row in read_results(run.folder.path)
        ]
    except KeyError:  # no validation images
        return
    best = min(range(len(rows)), key=lambda at: rows[at][1], default=0)
    if rows and rows[-1][1] > 1.2 * rows[best][1] and rows[-1][0] < rows[best][0]:
        yield (
            f"overfitting: the validation loss rose from {rows[best][1]:.3f} to {rows[-1][1]:.3f} "
            f"while the training loss fell to {rows[-1][0]:.3f}. best/ has the weights of the best "
            "evaluation; more images, more augmentation or fewer epochs would help"
        )
