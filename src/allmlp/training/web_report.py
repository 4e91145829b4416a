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
from allmlp.errors import plural, some_of
from allmlp.evaluation.metrics import Evaluation
from allmlp.io import atomic_write
from allmlp.models.layers import Classifier, preprocessing_of
from allmlp.page import details, image, items, page, table, tag
from allmlp.training.card import Outcome, described
from allmlp.training.fit import are_too_few
from allmlp.training.recipes import RECIPES, recipe
from allmlp.training.run_folder import RunFolder, identity, read_results

REPORT = "report.html"
_MAX_MISTAKES, _MAX_CLASSES = 24, 30
_ENOUGH = 20  # training images of a class


def run_report(outcome: Outcome, folder: RunFolder, commands: Sequence[tuple[str, str]]) -> None:
    """Writes the report of a run; `commands` are what to do next: purpose, command."""
    config, shown, source = outcome.config, outcome.shown, outcome.source
    parts = [tag("h1", f"{folder.path.absolute().name}: {config.recipe} on {config.data.source}")]
    if shown is not None:
        parts += _accuracy(shown, "validation images" if outcome.test is None else "test images")
    parts.append(tag("p", outcome.caveat))
    if outcome.test is not None and outcome.validation is not None:
        parts.append(tag("p", f"On the validation images: {outcome.validation.summary()}."))
    warnings = shown.warnings() if shown is not None else []
    parts.append(items([*_concerns(outcome, folder.path), *warnings], "warning"))
    parts.append(_figure(folder.plots, "curves", "Loss, accuracy and learning rate"))
    rows = [("data", line) for line in outcome.splits.describe()]
    rows.append(("model", described(outcome.model)))
    if config.model.weights is not None:
        rows.append(("begins with", config.model.weights))
    rows.append(("run", f"{outcome.length}, seed {config.seed}"))
    rows += [("not as in the recipe", line) for line in _changed(outcome)]
    parts += [tag("h2", "The run"), table(rows)]
    if shown is not None and source is not None:
        parts += _evaluation(shown, source, folder.plots)
    parts.append(
        details("A training batch as the model sees it", _figure(folder.plots, "train_batch", ""))
    )
    parts.append(tag("h2", "What to do next"))
    for purpose, command in commands:
        parts += [tag("p", purpose), tag("pre", command)]
    if folder.writes:
        atomic_write(folder.path / REPORT, page(f"{folder.path.name}: report", parts))


def evaluation_report(model: Classifier, result: Evaluation, source: Source, folder: Path) -> None:
    which = "held-out images of its run" if result.are_held_out else "images"
    parts = [
        tag("h1", f"{model.source or 'A model'} on {result.data}"),
        *_accuracy(result, which),
        items(result.warnings(), "warning"),
        table([("model", described(model)), ("input", preprocessing_of(model).summary())]),
        *_evaluation(result, source, folder),
    ]
    atomic_write(folder / REPORT, page(f"Report on {result.data}", parts))


def _accuracy(result: Evaluation, which: str) -> list[str]:
    on = f"On {len(result.labels):,} {which} ({result.data})."
    return [tag("p", result.summary(), "large"), tag("p", on), items(result.lines())]


def _evaluation(result: Evaluation, source: Source, folder: Path) -> Iterable[str]:
    rows = [row for row in result.per_class() if row["images"]]
    rows.sort(key=lambda row: row["recall"])
    cells = [[_cell(value) for value in row.values()] for row in rows]
    yield tag("h2", "Classes, the worst first")
    yield table(cells[:_MAX_CLASSES], list(rows[0]) if rows else ["no image has a label"])
    if len(rows) > _MAX_CLASSES:
        yield details(f"All {len(rows)} classes", table(cells, list(rows[0])))
    if pairs := result.worst_confusions(10):
        yield tag("h2", "Most often confused")
        yield table(
            [(true, predicted, f"{count}") for true, predicted, count in pairs],
            ("true class", "predicted", "images"),
        )
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


def _changed(outcome: Outcome) -> list[str]:
    """The settings that differ from the recipe's, and have an effect."""
    config = outcome.config
    if config.recipe not in RECIPES or config.model.train_only == "probe":
        return []
    own, usual = identity(config), identity(recipe(config.recipe))
    named = ("data.source", "model.weights")
    changed = [key for key, value in own.items() if value != usual.get(key) and key not in named]
    return [f"{key} = {own[key]}" for key in changed]


def _concerns(outcome: Outcome, run: Path) -> Iterable[str]:
    train = outcome.splits.train
    counts = train.class_counts()
    few = [f"{train.class_names[at]} ({counts[at]})" for at in np.flatnonzero(counts < _ENOUGH)]
    if few:
        yield f"few training images, fewer than {_ENOUGH}: {some_of(few)}"
    if are_too_few(outcome.config, outcome.model.num_parameters, len(train)):
        yield (
            f"{len(train):,} images are few for random weights: begin with trained ones "
            "(mixer finetune CHECKPOINT --data FOLDER)"
        )
    names = ("training_loss", "validation_loss")  # the latter only with validation images
    rows = (row for row in read_results(run) if row.keys() >= {*names})
    losses = [[float(row[name]) for name in names] for row in rows]
    best, last = min(losses, key=lambda row: row[1], default=[]), losses[-1:]
    if best and last[0][1] > 1.2 * best[1] and last[0][0] < best[0]:
        yield (
            f"overfitting: the validation loss rose from {best[1]:.3f} to {last[0][1]:.3f} "
            f"while the training loss fell to {last[0][0]:.3f}. best/ has the weights of the best "
            "evaluation; more images, more augmentation or fewer epochs would help"
        )
