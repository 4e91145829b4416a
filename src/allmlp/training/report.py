"""What a run says: before it on the console, after it also in files and on a page, report.html."""

from __future__ import annotations

import io
import itertools
import math
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from allmlp import plots
from allmlp.data.source import Source, array_shape
from allmlp.data.source_spec import parse_name
from allmlp.data.sources import names_source
from allmlp.errors import plural, some_of
from allmlp.evaluation.calibration import fitted, summary
from allmlp.evaluation.metrics import Evaluation, evaluate_source
from allmlp.evaluation.predictor import Predictor
from allmlp.io import atomic_write
from allmlp.models.layers import Classifier, ImageClassifier, preprocessing_of
from allmlp.page import details, image, items, page, table, tag
from allmlp.training.card import Outcome, described, model_card, public_name
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import check_number_bad
from allmlp.training.fit import MOST_WEIGHTS, describe_fit
from allmlp.training.optim import balance_weights
from allmlp.training.recipes import RECIPES, recipe
from allmlp.training.run_folder import identity, read_results
from allmlp.training.state import Run
from allmlp.weights.checkpoints import recommended
from allmlp.weights.load import load_model
from allmlp.weights.save import save_model

REPORT = "report.html"
_MAX_MISTAKES, _MAX_CLASSES = 24, 30
_ENOUGH = 20  # training images of a class
_UNEVEN = 10  # times as many images in one class as in another


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        run_folder: where everything was written.
        validation: with the weights in best/; None if no images were held out.
        test: with the same weights; None if the data has no test images.
        expected_seconds: how long the run would take, as measured before its start; None if that
            was not measured, as in a quiet run.
    """

    run_folder: Path
    validation: Evaluation | None
    test: Evaluation | None
    expected_seconds: float | None = None


def announce(run: Run, *, in_study: bool = False) -> None:
    for name, text in _facts(run):
        run.report.say(f"{name:<9}{text}")
    for text in () if in_study else _too_few(run):
        run.report.say(f"few      {text}", style="yellow")
    run.report.say(f"results  {run.folder.path}")


def _too_few(run: Run) -> Iterable[str]:
    """Says if the images are too few for random weights, and what to do."""
    config, images, weights = run.config, run.splits.train, run.model.num_parameters
    are_images = array_shape(images) is None  # which published weights know
    if are_images and config.model.weights is None and weights > MOST_WEIGHTS * len(images):
        name = recommended("speed" if run.compute.device.type == "cpu" else "accuracy").name
        yield (
            f"{plural(len(images), 'image')} for {weights:,} random weights: the accuracy will be "
            f"low. Up to {MOST_WEIGHTS:,} weights per image are reasonable; trained weights need "
            f"far fewer images: {_command('finetune', name, '--data', config.data.source)}"
        )


def _facts(run: Run) -> list[tuple[str, str]]:
    """Returns what a run begins with, for console and page."""
    config, model, world, device = run.config, run.model, run.world, run.compute.device
    first, *more = run.splits.describe()
    lines = [("data", f"{config.data.source}: {first}"), *(("", line) for line in more)]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    is_all = trained == model.num_parameters
    head = "" if is_all else f"; only the {trained:,} of the head are trained"
    kind = type(model).__name__.removeprefix("FSDP")
    lines.append(("model", f"{kind}, {described(model)}{head}"))
    if config.model.weights is not None:
        lines.append(("", f"starts from the weights {config.model.weights}"))
    threads = f" ({plural(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else ""
    where = f"{device}{threads}"
    if world.size > 1:
        where = f"{world.size} processes on {where}, sharding {config.sharding}"
    length, fit = f"{config.length}, batch {config.batch_size}", None
    if config.model.train_only == "probe":
        length = "linear probe, the head alone on frozen features of images without augmentation"
    else:
        fit = describe_fit(config, len(run.splits.train), device.type)
    how = f"{length}, {where}, {run.compute.why}"
    lines.append(("run", f"recipe {config.recipe}, seed {config.seed}: {how}"))
    lines += _balance(run)
    return lines if fit is None else [*lines, ("fit", fit)]


def _balance(run: Run) -> Iterable[tuple[str, str]]:
    """Says what `balance` does to the rarest and the most frequent class, or that it may help."""
    source, balance = run.splits.train, run.config.data.balance
    counts = source.class_counts()
    present = np.flatnonzero(counts)
    few, many = (present[at] for at in (counts[present].argmin(), counts[present].argmax()))
    names, weights = source.class_names, balance_weights(source)
    if balance != "none":
        text = "images drawn {:.3g} times an epoch" if balance == "sampler" else "weight {:.3g}"
        parts = [f"{names[at]} {text.format(weights[at])}" for at in (few, many)]
        yield "balance", f"{balance}: {', '.join(parts)}"
    elif counts[many] >= _UNEVEN * counts[few] and run.config.model.train_only != "probe":
        ways = "weights" if source.is_multi_label else "weights or sampler"
        yield "note", f"{names[few]!r} is rare: balance ({ways}) would give it equal weight"


def duration(seconds: float) -> str:
    """Formats a duration in its two largest units: "12 min 5 s", "4 days 11 h"."""
    units = (("day", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    for (name, size), (small_name, small) in itertools.pairwise(units):
        whole, rest = divmod(round(seconds / small), size // small)
        if whole:
            name += "s" * (name == "day" and whole > 1)
            return f"{whole:,} {name}" + (f" {rest} {small_name}" if rest and whole < 100 else "")
    return f"{round(seconds)} s"


def resume_command(run: Run) -> str:
    if run.world.size > 1:
        return "the same torchrun command again"
    return _command("train", "--resume", str(run.folder.path))


def _command(*words: str) -> str:
    """A command to copy, with the path of `mixer` if it is not on the PATH."""
    started = Path(sys.argv[0])
    is_hidden = started.name == "mixer" and not shutil.which("mixer")
    return shlex.join([str(started) if is_hidden else "mixer", *words])


def predictor_of(run: Run, model: ImageClassifier, batch_size: int, precision: str) -> Predictor:
    return Predictor(
        model,
        device=str(run.compute.device),
        precision=precision,
        batch_size=batch_size,
        num_workers=run.config.data.num_workers,
        timeout=run.config.data.timeout,
    )


def measure(
    model: ImageClassifier, source: Source, run: Run, precision: str | None = None
) -> Evaluation:
    images_each = math.ceil(len(source) / run.world.size)  # so that no process idles
    batch_size = max(1, min(256, run.config.batch_size // run.world.size, images_each))
    predictor = predictor_of(run, model, batch_size, precision or run.compute.precision)
    return evaluate_source(predictor, source, allow_missing_classes=True, world=run.world)


def finish(run: Run, *, in_study: bool = False) -> TrainResult:
    """Measures the best weights; writes figures, card, page and console output."""
    config, splits, folder, say = run.config, run.splits, run.folder, run.report.say
    model = load_model(folder.best)
    validation = test = None
    if splits.validation is not None:  # float32: the same numbers as `mixer evaluate`
        validation = measure(model, splits.validation, run, "float32")
        validation.are_held_out = splits.held_out
        if config.data.fold is None:  # a fold chooses nothing
            name = public_name(config.data.source, splits.validation.name)
            before, model.decision = model.decision, fitted(validation, name)
            validation = replace(validation, decision=model.decision)
            if model.decision != before and run.world.is_main:
                save_model(model, folder.best, overwrite=True)
    if splits.test is not None:
        test = measure(model, splits.test, run, "float32")
        run.name_bad(test.bad)
    reached = TrainResult(folder.path, validation, test)
    if not run.world.is_main:
        return reached
    outcome = Outcome(config, splits, model, validation, test)
    shown, source, drawn = outcome.shown, outcome.source, list[str]()
    kind = "validation" if test is None else "test"
    if config.model.train_only != "probe":  # which has neither batches nor a curve
        folder.draw_curves()
        drawn += ["train_batch", "curves"]
    if shown is not None and source is not None:
        shown.save(folder.path / kind, overwrite=True)
        drawn += plots.save_evaluation(shown, source, folder.plots)
    folder.write("best/README.md", model_card(outcome))
    say("")
    if shown is None or (test is None and not in_study):
        say(outcome.caveat)
    if shown is not None:
        right = f"{shown.correct.sum():,} of {plural(len(shown.labels), 'image')}"
        correct = "with all labels right" if shown.is_multi_label else "correct"
        top5 = "" if shown.top5 is None else f", top-5 {shown.top5:.2%}"
        line = f"{kind}{'' if shown.is_multi_label else ' accuracy'} {shown.summary()}{top5} "
        say(f"{line}({right} {correct}{shown.chance})", style="bold green")
        for line in shown.warnings():
            say(f"warning  {line}", style="yellow")
    if run.named_bad:
        what = f"warning  {plural(len(run.named_bad), 'bad image')} left out, named in "
        say(f"{what}{folder.path / 'bad_files.txt'}", style="yellow")
    say(f"model    {folder.best}")
    for line in summary(model.decision):
        say(f"         {line}")
    say(f"plots    {folder.plots}: {', '.join(drawn)}")
    if test is not None and splits.test is not None:
        check_number_bad(test.bad, splits.test, config.data.max_bad)
    for name in drawn:
        folder.loggers.tell("image", run.num_steps, name, folder.plots / f"{name}.png")
    parts = [("validation", validation), ("test", test)]
    figures = {f"{part}_{k}": v for part, found in parts if found for k, v in found.figures()}
    folder.loggers.finish(figures)
    commands = _next_commands(run)
    _write_page(run, outcome, commands)
    if not in_study:
        say("next")
        for _, command in commands[: 2 if shown is not None else 1]:
            say(f"         {command}")
        if names_source(config.data.source):
            own = _command("train", "--data", "FOLDER", "--image-size", "64")
            say(f"         {own}     (your own images)")
    say(f"report   {folder.path / REPORT}")
    return reached


def _next_commands(run: Run) -> list[tuple[str, str]]:
    splits, data, folder = run.splits, run.config.data.source, str(run.folder.path)
    example = splits.test or splits.validation or splits.train
    held_out = example is splits.validation and splits.held_out  # they have no data name
    if Path(example.item_name(0)).is_file():
        name = example.item_name(0)
    elif held_out:
        name = data if parse_name(data).split is not None else f"{data}:train"
    else:
        name = example.name
    commands = [("Classify images", ["predict", folder, name])]
    if run.config.model.train_only == "probe":
        all_weights = "Train all weights, beginning with this head"
        commands.insert(0, (all_weights, ["finetune", folder, "--data", data]))
    measured = []
    if example is not splits.train:
        source = parse_name(data).source if held_out else data
        measured = ["--data", f"{source}:{'test' if example is splits.test else 'validation'}"]
        commands.append(("Measure it again", ["evaluate", folder, *measured]))
    onnx = str(run.folder.path / "model.onnx")
    commands += [
        ("Export it for another runtime", ["export", folder, "--output", onnx, *measured]),
        ("Serve it, with a page to drop images on", ["serve", folder]),
        ("Share it on the Hugging Face hub", ["push", folder, "OWNER/NAME"]),
    ]
    return [(purpose, _command(*words)) for purpose, words in commands]


def _write_page(run: Run, outcome: Outcome, commands: Sequence[tuple[str, str]]) -> None:
    config, folder, shown, source = run.config, run.folder, outcome.shown, outcome.source
    parts = [tag("h1", f"{folder.path.absolute().name}: {config.recipe} on {config.data.source}")]
    if shown is not None:
        parts += _accuracy(shown, "validation images" if outcome.test is None else "test images")
    parts.append(tag("p", outcome.caveat))
    if outcome.test is not None and outcome.validation is not None:
        parts.append(tag("p", f"On the validation images: {outcome.validation.summary()}."))
    warnings = shown.warnings() if shown is not None else []
    parts.append(items([*_too_few(run), *_concerns(run), *warnings], "warning"))
    parts.append(_figure(folder.plots, "curves", "Loss, accuracy and learning rate"))
    rows = [*_facts(run), *(("not as in the recipe", line) for line in _changed(config))]
    parts += [tag("h2", "The run"), table(rows)]
    if shown is not None and source is not None:
        parts += _evaluation(shown, source, folder.plots)
    parts.append(
        details("A training batch as the model sees it", _figure(folder.plots, "train_batch", ""))
    )
    parts.append(tag("h2", "What to do next"))
    for purpose, command in commands:
        parts += [tag("p", purpose), tag("pre", command)]
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


def _changed(config: TrainConfig) -> list[str]:
    """The settings that differ from the recipe's, and have an effect."""
    if config.recipe not in RECIPES or config.model.train_only == "probe":
        return []
    own, usual = identity(config), identity(recipe(config.recipe))
    usual["model.weights"] = config.model.weights  # said elsewhere
    return [f"{key} = {value}" for key, value in own.items() if value != usual.get(key)]


def _concerns(run: Run) -> Iterable[str]:
    train = run.splits.train
    counts = train.class_counts()
    few = [f"{train.class_names[at]} ({counts[at]})" for at in np.flatnonzero(counts < _ENOUGH)]
    if few:
        yield f"few training images, fewer than {_ENOUGH}: {some_of(few)}"
    names = ("training_loss", "validation_loss")  # the latter only with validation images
    rows = (row for row in read_results(run.folder.path) if row.keys() >= {*names})
    losses = [[float(row[name]) for name in names] for row in rows]
    best, last = min(losses, key=lambda row: row[1], default=[]), losses[-1:]
    if best and last[0][1] > 1.2 * best[1] and last[0][0] < best[0]:
        yield (
            f"overfitting: the validation loss rose from {best[1]:.3f} to {last[0][1]:.3f} "
            f"while the training loss fell to {last[0][0]:.3f}. best/ has the weights of the best "
            "evaluation; more images, more augmentation or fewer epochs would help"
        )
