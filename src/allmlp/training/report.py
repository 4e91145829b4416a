"""Console output before a run, and final measurements, plots, files and output after it."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from allmlp import plots
from allmlp.data.source import Source, array_shape
from allmlp.data.source_spec import parse_name
from allmlp.data.sources import names_source
from allmlp.errors import plural
from allmlp.evaluation.calibration import fitted, summary
from allmlp.evaluation.metrics import Evaluation, evaluate_source
from allmlp.evaluation.predictor import Predictor
from allmlp.models.layers import ImageClassifier
from allmlp.training.card import Outcome, described, model_card, public_name
from allmlp.training.dataset import check_number_bad
from allmlp.training.fit import MOST_WEIGHTS, are_too_few, describe_fit
from allmlp.training.optim import class_weights, positive_weights
from allmlp.training.state import Run
from allmlp.training.web_report import REPORT, run_report
from allmlp.weights.checkpoints import recommended
from allmlp.weights.load import load_model
from allmlp.weights.save import save_model

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
    config, model, world, train = run.config, run.model, run.world, run.splits.train
    device = run.compute.device
    first, *more = run.splits.describe()
    lines = [("data", f"{config.data.source}: {first}"), *(("", line) for line in more)]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    is_all = trained == model.num_parameters
    head = "" if is_all else f"; only the {trained:,} of the head are trained"
    lines.append(("model", f"{type(model).__name__}, {described(model)}{head}"))
    if config.model.weights is not None:
        lines.append(("", f"starts from the weights {config.model.weights}"))
    threads = f" ({plural(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else ""
    where = f"{device}{threads}"
    if world.size > 1:
        where = f"{world.size} processes on {where}, sharding {config.sharding}"
    length = Outcome(config, run.splits, model).length
    how = f"{length}, {where}, {run.compute.why}"
    lines.append(("run", f"recipe {config.recipe}, seed {config.seed}: {how}"))
    lines += _balance(run)
    fit = describe_fit(config, len(train), device.type)
    if fit is not None and config.model.train_only != "probe":
        lines.append(("fit", fit))
    for name, text in lines:
        run.report.say(f"{name:<9}{text}")
    are_images = array_shape(train) is None  # which published weights know
    if are_images and not in_study and are_too_few(config, model.num_parameters, len(train)):
        name = recommended("speed" if device.type == "cpu" else "accuracy").name
        run.report.say(
            f"few      {plural(len(train), 'image')} for {model.num_parameters:,} random weights: "
            f"the accuracy will be low.\n         Up to {MOST_WEIGHTS:,} weights per image are "
            "reasonable; trained weights need far fewer images:\n"
            f"         {_command('finetune', name, '--data', config.data.source)}",
            style="yellow",
        )
    run.report.say(f"results  {run.folder.path}")


def balance_weights(train: Source) -> np.ndarray:
    """Returns the weight of each class, or where a label is present, with balance=weights."""
    counts = train.class_counts()
    return positive_weights(counts, len(train)) if train.is_multi_label else class_weights(counts)


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
    text = str(timedelta(seconds=round(seconds)))
    return f"{text} h" if seconds >= 3600 else f"{text.removeprefix('0:')} min"


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
    measured = [
        (part, found) for part, found in (("validation", validation), ("test", test)) if found
    ]
    folder.loggers.finish(
        {f"{part}_{name}": value for part, found in measured for name, value in found.figures()}
    )
    commands = _next_commands(run)
    run_report(outcome, folder, commands)
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
