"""Console output before a run, and final measurements, plots, files and output after it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
from allmlp.models.layers import ImageClassifier, flops_text
from allmlp.training.card import model_card, public_name
from allmlp.training.dataset import check_number_bad
from allmlp.training.fit import MOST_WEIGHTS, are_too_few, describe_fit
from allmlp.training.optim import class_weights
from allmlp.training.state import Run
from allmlp.training.web_report import REPORT, run_report
from allmlp.weights.checkpoints import recommended
from allmlp.weights.load import load_model
from allmlp.weights.save import save_model

_UNEVEN = 10  # times as many images in one class as in another
_LONG = 600.0  # seconds


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


def announce(run: Run, model: ImageClassifier, *, in_study: bool = False) -> None:
    """Prints the settings and the data before training starts."""
    config, world, say = run.config, run.world, run.report.say
    height, width = model.config.image_size
    found = run.splits.describe()
    say(f"data     {config.data.source}: {found[0]}")
    for line in found[1:]:
        say(f"         {line}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    is_all = trained == model.num_parameters
    say(
        f"model    {type(model).__name__}, {model.config.summary()}, {height}x{width} pixels: "
        f"{model.num_parameters:,} parameters, {flops_text(model.config.flops)} per image"
        + ("" if is_all else f"; only the {trained:,} of the head are trained")
    )
    if config.model.weights is not None:
        say(f"         begins with the weights {config.model.weights}")
    where = f"{run.compute.device}"
    if run.compute.device.type == "cpu":
        where += f" ({plural(torch.get_num_threads(), 'thread')})"
    if world.size > 1:
        where = f"{world.size} processes on {where}, sharding {config.sharding}"
    elif config.sharding != "none":
        where += f" (one process: sharding {config.sharding} does nothing)"
    length, num_images = f"{config.length}, batch {config.batch_size}", len(run.splits.train)
    if config.model.train_only == "probe":
        length = "linear probe, the head alone on frozen features of images without augmentation"
    say(
        f"run      recipe {config.recipe}, seed {config.seed}: {length}, {where}, {run.compute.why}"
    )
    _say_balance(run)
    fit = describe_fit(config, num_images)
    if fit is not None and config.model.train_only != "probe":
        say(f"fit      {fit}")
    are_images = array_shape(run.splits.train) is None  # which published weights know
    if are_images and not in_study and are_too_few(config, model.num_parameters, num_images):
        name = recommended("speed" if run.compute.device.type == "cpu" else "accuracy").name
        command = shlex.join([_command(), "finetune", name, "--data", config.data.source])
        for line in (
            f"few      {plural(num_images, 'image')} for {model.num_parameters:,} random weights, "
            f"{model.num_parameters / num_images:,.0f} per image: the accuracy will be low.",
            f"         Up to {MOST_WEIGHTS:,} per image are reasonable; trained weights need far "
            "fewer images:",
            f"         {command}",
        ):
            say(line, style="yellow")
    say(f"results  {run.folder.path}")


def announce_time(run: Run, seconds: float, steps: int, probe: float | None) -> None:
    """Prints how long the rest of a run takes, and the probe if that is far shorter."""
    config, say = run.config, run.report.say
    each = f"{plural(steps, 'step')} of {seconds / steps:.2g} s, with its evaluations"
    if config.model.train_only == "probe":
        each = f"{plural(len(run.splits.train), 'image')} to compute features of"
    say(f"time     about {duration(seconds)} ({each}), measured on this machine")
    if probe is not None and seconds > _LONG > 10 * probe:
        weights, data = config.model.weights or "", config.data.source
        command = shlex.join([_command(), "finetune", weights, "--data", data, "--probe"])
        say(f"         a linear probe takes about {duration(probe)}: {command}")


def _say_balance(run: Run) -> None:
    """Prints what `balance` does to the rarest and the most frequent class, or that it may help."""
    source, balance, say = run.splits.train, run.config.data.balance, run.report.say
    counts = source.class_counts()
    present = np.flatnonzero(counts)
    few, many = (present[at] for at in (counts[present].argmin(), counts[present].argmax()))
    if balance == "none":
        is_fixed = source.is_multi_label or run.config.model.train_only == "probe"
        if counts[many] >= _UNEVEN * counts[few] and not is_fixed:
            name = source.class_names[few]
            say(f"note     {name!r} is rare: balance (weights or sampler) lets it count as much")
        return
    weights = class_weights(counts)
    text = "images drawn {:.3g} times an epoch" if balance == "sampler" else "weight {:.3g}"
    parts = [f"{source.class_names[at]} {text.format(weights[at])}" for at in (few, many)]
    say(f"balance  {balance}: {', '.join(parts)}")


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
    return shlex.join([_command(), "train", "--resume", str(run.folder.path)])


def _command() -> str:
    """The name of the `mixer` command, with its path if it is not on the PATH."""
    started = Path(sys.argv[0])
    return str(started) if started.name == "mixer" and not shutil.which("mixer") else "mixer"


def measure(model: ImageClassifier, source: Source, run: Run) -> Evaluation:
    """Evaluates a model, identical on all processes, on all images."""
    images_each = math.ceil(len(source) / run.world.size)  # so that no process idles
    own = run.config.batch_size // run.world.size
    predictor = Predictor(
        model,
        device=str(run.compute.device),
        precision=run.compute.precision,
        batch_size=max(1, min(256, own, images_each)),
        num_workers=run.config.data.num_workers,
        timeout=run.config.data.timeout,
    )
    return evaluate_source(predictor, source, allow_missing_classes=True, world=run.world)


def finish(run: Run, *, in_study: bool = False) -> TrainResult:
    """Evaluates the best weights, draws plots, writes the card and prints the next commands."""
    splits, folder, say = run.splits, run.folder, run.report.say
    run.world.barrier()  # until the main process has written the weights
    model = load_model(folder.best)
    # Same numbers as `mixer evaluate`.
    exact = dataclasses.replace(run.compute, precision="float32", compile=False)
    exactly = dataclasses.replace(run, compute=exact)
    validation = test = None
    if splits.validation is not None:
        validation = measure(model, splits.validation, exactly)
        validation.are_held_out = splits.held_out
        name = public_name(run.config.data.source, splits.validation.name)
        before, model.decision = model.decision, fitted(validation, name)
        validation = dataclasses.replace(validation, decision=model.decision)
        if model.decision != before and run.world.is_main:
            save_model(model, folder.best, overwrite=True)
    if splits.test is not None:
        test = measure(model, splits.test, exactly)
    result = TrainResult(folder.path, validation, test)
    if not run.world.is_main:
        return result
    bad = folder.bad_files()
    for image in test.bad if test is not None else []:  # bad validation images were listed before
        if image.name not in bad:
            folder.log_bad_file(image)
        bad.add(image.name)
        say(f"left out of the accuracy: {image.name}: {image.what}", style="yellow")
    drawn = []
    if run.config.model.train_only != "probe":  # which has neither batches nor a curve
        folder.draw_curves()
        drawn += ["train_batch", "curves"]
    shown, source = (test, splits.test) if test is not None else (validation, splits.validation)
    if shown is not None and source is not None:
        shown.save(folder.path / ("validation" if test is None else "test"), overwrite=True)
        drawn += plots.save_evaluation(shown, source, folder.plots)
    folder.write("best/README.md", model_card(model, run.config, splits, validation, test))
    say("")
    if shown is None:
        say("all images were trained on, none are left to measure the accuracy")
    else:
        if test is None and not in_study:
            say("the data has no test images; this is the accuracy on the validation images,")
            say("by which the weights were chosen, so expect somewhat less on new ones")
        right, images = int(shown.correct.sum()), len(shown.labels)
        correct = "with all labels right" if shown.is_multi_label else "correct"
        top5 = "" if shown.top5 is None else f", top-5 {shown.top5:.2%}"
        kind = "" if shown.is_multi_label else " accuracy"
        line = f"{'validation' if test is None else 'test'}{kind} {shown.summary()}{top5} "
        line += f"({right} of {plural(images, 'image')} {correct}{shown.chance})"
        say(line, style="bold green")
        for line in shown.warnings():
            say(f"warning  {line}", style="yellow")
    if bad:
        what = f"warning  {plural(len(bad), 'bad image')} left out, named in "
        say(f"{what}{folder.path / 'bad_files.txt'}", style="yellow")
    say(f"model    {folder.best}")
    for line in summary(model.decision):
        say(f"         {line}")
    say(f"plots    {folder.plots}: {', '.join(drawn)}")
    if test is not None and splits.test is not None:
        check_number_bad(test.bad, splits.test, run.config.data.max_bad)
    _tell_results(run, result, drawn)
    commands = _next_commands(run)
    run_report(run, model, validation, test, commands)
    if not in_study:
        say("next")
        for _, command in commands[: 2 if shown is not None else 1]:
            say(f"         {command}")
        if names_source(run.config.data.source):
            text = f"{_command()} train --data FOLDER --image-size 64"
            say(f"         {text}     (your own images)")
    say(f"report   {folder.path / REPORT}")
    return result


def _tell_results(run: Run, result: TrainResult, drawn: Sequence[str]) -> None:
    """Tells the loggers the final figures and metrics."""
    loggers, plots_folder = run.folder.loggers, run.folder.plots
    for name in drawn:
        loggers.tell("image", run.num_steps, name, plots_folder / f"{name}.png")
    measured = {"validation": result.validation, "test": result.test}
    found = {kind: dict(found.figures()) for kind, found in measured.items() if found}
    loggers.finish({f"{kind}_{n}": v for kind, values in found.items() for n, v in values.items()})


def _next_commands(run: Run) -> list[tuple[str, str]]:
    """Returns what to do next, ready to copy: purpose, command."""
    splits, data, mixer = run.splits, run.config.data.source, _command()
    example = splits.test or splits.validation or splits.train
    held_out = example is splits.validation and splits.held_out  # they have no data name
    if Path(example.item_name(0)).is_file():
        name = example.item_name(0)
    elif held_out:
        name = data if parse_name(data).split is not None else f"{data}:train"
    else:
        name = example.name
    folder = str(run.folder.path)
    commands = [("Classify images", ["predict", folder, name])]
    if run.config.model.train_only == "probe":
        all_weights = "Train all weights, beginning with this head"
        commands.insert(0, (all_weights, ["finetune", folder, "--data", data]))
    measured = []
    if example is not splits.train:
        source = parse_name(data).source if held_out else data
        asked = f"{source}:{'test' if example is splits.test else 'validation'}"
        measured = ["--data", asked]
        commands.append(("Measure it again", ["evaluate", folder, *measured]))
    onnx = str(run.folder.path / "model.onnx")
    commands += [
        ("Export it for another runtime", ["export", folder, "--output", onnx, *measured]),
        ("Serve it, with a page to drop images on", ["serve", folder]),
        ("Share it on the Hugging Face hub", ["push", folder, "OWNER/NAME"]),
    ]
    return [(purpose, shlex.join([mixer, *words])) for purpose, words in commands]
