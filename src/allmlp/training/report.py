"""What a run prints before it begins, and what it measures, draws, writes and prints at its end."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from allmlp import plots
from allmlp.console import Reporter
from allmlp.data.source import Source
from allmlp.data.source_spec import parse_name
from allmlp.data.sources import names_source
from allmlp.errors import plural
from allmlp.evaluation.metrics import Evaluation
from allmlp.models.layers import ImageClassifier, count_parameters, flops_text
from allmlp.runtime.device import ComputePolicy
from allmlp.training.card import model_card
from allmlp.training.cost import operations, planned, power
from allmlp.training.dataset import check_number_bad
from allmlp.training.measure import measure
from allmlp.training.state import Run
from allmlp.weights.load import load_model


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        run_folder: where everything was written.
        validation: of the weights in best/; None if no images were held out.
        test: of the same weights; None if the data has no test images.
    """

    run_folder: Path
    validation: Evaluation | None
    test: Evaluation | None


def announce(run: Run, model: ImageClassifier) -> None:
    """Prints what was found and what will happen."""
    config, world, say = run.config, run.world, run.report.say
    height, width = model.config.image_size
    found = run.splits.describe()
    say(f"data     {config.data.source}: {found[0]}")
    for line in found[1:]:
        say(f"         {line}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    is_all = trained == count_parameters(model)
    say(
        f"model    {type(model).__name__}, {model.config.summary()}, {height}x{width} pixels: "
        f"{count_parameters(model):,} parameters, {flops_text(model.config.flops)} per image"
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
    say(
        f"run      recipe {config.recipe}, seed {config.seed}: {planned(config)}, "
        f"batch {config.batch_size}, {where}, {run.compute.why}"
    )
    images = run.num_steps * config.batch_size
    total = operations(model.config.flops, images, config.optimizer)
    say(f"cost     {power(total)} operations, {plural(images, 'image')}")
    say(f"results  {run.folder.path}")


def resume_command(run: Run) -> str:
    """Returns what to type to resume the run."""
    if run.world.size > 1:
        return "the same torchrun command again"
    return shlex.join([_command(), "train", "--resume", str(run.folder.path)])


def _command() -> str:
    """How this machine's user starts `mixer`: with its path where it is not on the PATH."""
    started = Path(sys.argv[0])
    return str(started) if started.name == "mixer" and not shutil.which("mixer") else "mixer"


def finish(run: Run, *, in_study: bool = False) -> TrainResult:
    """Measures the best weights, draws the plots, writes the card and prints what to do next."""
    config, splits, folder, report = run.config, run.splits, run.folder, run.report
    run.world.barrier()  # until the main process has written the weights
    model = load_model(folder.best)
    exact = ComputePolicy(run.compute.device, "float32", False, "as `mixer evaluate` measures")

    def measured(source: Source | None) -> Evaluation | None:
        return None if source is None else measure(model, source, config, exact, run.world)

    validation, test = measured(splits.validation), measured(splits.test)
    result = TrainResult(folder.path, validation, test)
    if validation is not None:
        validation.are_held_out = splits.held_out
    if not run.world.is_main:
        return result
    known = {image.name for image in folder.named_bad_files()}
    for image in test.bad if test is not None else []:  # those of validation were named before
        if image.name not in known:
            folder.log_bad_file(image)
        report.say(f"left out of the accuracy: {image.name}: {image.what}", style="yellow")
    folder.draw_curves()
    drawn = ["train_batch", "curves"]
    shown, source = (test, splits.test) if test is not None else (validation, splits.validation)
    if shown is not None and source is not None:
        shown.save(folder.path / ("validation" if test is None else "test"), overwrite=True)
        drawn += plots.save_evaluation(shown, source, folder.plots)
    folder.write_card(model_card(model, config, splits, validation, test))
    report.say("")
    if shown is not None:
        _say_accuracy(report, shown, is_test=test is not None, in_study=in_study)
    else:
        report.say("all images were trained on, none are left to measure the accuracy")
    skipped = {image.name for image in folder.named_bad_files()}
    if skipped:
        what = f"warning  {plural(len(skipped), 'bad image')} left out, named in "
        report.say(f"{what}{folder.path / 'bad_files.txt'}", style="yellow")
    report.say(f"model    {folder.best}")
    report.say(f"plots    {folder.plots}: {', '.join(drawn)}")
    if test is not None and splits.test is not None:
        check_number_bad(test.bad, splits.test, config.data.max_bad)
    if not in_study:
        _say_next(run)
    return result


def _say_accuracy(report: Reporter, shown: Evaluation, *, is_test: bool, in_study: bool) -> None:
    wrong = int((shown.predictions != shown.labels).sum())
    top5 = "" if shown.top5 is None else f", top-5 {shown.top5:.2%}"
    if not is_test and not in_study:
        report.say("the data has no test images; this is the accuracy on the validation images,")
        report.say("by which the weights were chosen, so expect somewhat less on new ones")
    line = f"{'test' if is_test else 'validation'} accuracy {shown.top1:.2%}{top5} "
    line += f"({len(shown.labels) - wrong} of {plural(len(shown.labels), 'image')} correct)"
    report.say(line, style="bold green")
    for line in shown.warnings():
        report.say(f"warning  {line}", style="yellow")


def _say_next(run: Run) -> None:
    """Prints what to type next: commands that work unchanged."""
    splits, data, mixer = run.splits, run.config.data.source, _command()
    example = splits.test or splits.validation or splits.train
    held_out = example is splits.validation and splits.held_out  # images without a name as data
    if Path(example.item_name(0)).is_file():
        name = example.item_name(0)
    elif held_out:
        name = data if parse_name(data).split is not None else f"{data}:train"
    else:
        name = example.name
    say, folder = run.report.say, str(run.folder.path)
    say("next")
    say(f"         {shlex.join([mixer, 'predict', folder, name])}")
    if example is not splits.train:
        source = parse_name(data).source if held_out else data
        asked = f"{source}:{'test' if example is splits.test else 'validation'}"
        say(f"         {shlex.join([mixer, 'evaluate', folder, '--data', asked])}")
    if names_source(data):
        say(f"         {mixer} train --data FOLDER --image-size 64     (your own images)")
