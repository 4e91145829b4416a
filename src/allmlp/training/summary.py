"""What a run says before it begins, and what it measures, draws, writes and says at its end."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from allmlp import plots
from allmlp.console import Reporter
from allmlp.data.items import Source
from allmlp.data.source_names import parse_name
from allmlp.data.sources import names_source
from allmlp.errors import plural
from allmlp.evaluation.accuracy import Evaluation
from allmlp.evaluation.throughput import count_parameters, flops_text
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.device import ComputePolicy
from allmlp.runtime.world import World
from allmlp.training.card import model_card
from allmlp.training.config import TrainConfig
from allmlp.training.cost import operations, planned, power
from allmlp.training.dataset import Splits, refuse_too_many
from allmlp.training.measure import measure
from allmlp.training.run_folder import RunFolder
from allmlp.weights.load import load_model


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        run_folder: where everything lies.
        validation: of the weights in best/; None where no images were held out.
        test: of the same weights; None where the data has no test images.
    """

    run_folder: Path
    validation: Evaluation | None
    test: Evaluation | None


def announce(
    report: Reporter,
    config: TrainConfig,
    splits: Splits,
    model: ImageClassifier,
    run: RunFolder,
    compute: ComputePolicy,
    num_steps: int,
    world: World,
) -> None:
    """Says what was found and what will happen, before it happens."""
    height, width = model.config.image_size
    found = splits.describe()
    report.say(f"data     {config.data.source}: {found[0]}")
    for line in found[1:]:
        report.say(f"         {line}")
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    all_of_them = trained == count_parameters(model)
    report.say(
        f"model    {type(model).__name__}, {model.config.summary()}, {height}x{width} pixels: "
        f"{count_parameters(model):,} parameters, {flops_text(model.config.flops)} an image"
        + ("" if all_of_them else f"; only the {trained:,} of the head are trained")
    )
    if config.model.weights is not None:
        report.say(f"         begins with the weights {config.model.weights}")
    where = f"{compute.device}"
    if compute.device.type == "cpu":
        where += f" ({_threads()})"
    if world.size > 1:
        where = f"{world.size} processes on {where}, sharding {config.sharding}"
    elif config.sharding != "none":
        where += f" (one process: sharding {config.sharding} has nothing to share)"
    report.say(
        f"run      recipe {config.recipe}, seed {config.seed}: {planned(config)}, "
        f"batch {config.batch_size}, {where}, {compute.why}"
    )
    images = num_steps * config.batch_size
    sam = 1.0 - config.optimizer.sharpness_from if config.optimizer.sharpness else 0.0
    total = operations(model.config.flops, images, sam)
    report.say(f"cost     {power(total)} operations, {plural(images, 'image')}")
    report.say(f"results  {run.path}")


def resume_command(run: RunFolder, world: World) -> str:
    """Returns what to type so that the run goes on."""
    if world.size > 1:
        return "the same torchrun command again"
    return shlex.join([_command(), "train", "--resume", str(run.path)])


def _command() -> str:
    """How this machine's user starts `mixer`: with its path where it is not on the PATH."""
    started = Path(sys.argv[0])
    return str(started) if started.name == "mixer" and not shutil.which("mixer") else "mixer"


def _threads() -> str:
    return plural(torch.get_num_threads(), "thread")


def finish(
    config: TrainConfig,
    splits: Splits,
    run: RunFolder,
    report: Reporter,
    device: torch.device,
    world: World,
    *,
    in_study: bool = False,
) -> TrainResult:
    """Measures the best weights, draws the pictures, writes the card and says what to do next."""
    world.barrier()  # until the first process has written them
    model = load_model(run.best)
    exact = ComputePolicy(device, "float32", False, "as `mixer evaluate` measures")

    def measured(source: Source | None) -> Evaluation | None:
        return None if source is None else measure(model, source, config, exact, world)

    validation, test = measured(splits.validation), measured(splits.test)
    if validation is not None:
        validation.are_held_out = splits.held_out
    if not world.is_main:
        return TrainResult(run.path, validation, test)
    known = {each.name for each in run.named_bad_files()}
    for each in test.bad if test is not None else []:  # those of validation were named before
        if each.name not in known:
            run.log_bad_file(each)
        report.say(f"left out of the accuracy: {each.name}: {each.what}", style="yellow")
    run.draw_curves()
    drawn = ["train_batch", "curves"]
    shown, source = (test, splits.test) if test is not None else (validation, splits.validation)
    if shown is not None and source is not None:
        shown.save(run.path / ("validation" if test is None else "test"), overwrite=True)
        drawn += plots.save_evaluation(shown, source, run.plots)
    run.write_card(model_card(model, config, splits, validation, test))
    report.say("")
    if shown is not None:
        _say_accuracy(report, shown, is_test=test is not None, in_study=in_study)
    else:
        report.say("all images were trained on, and none is left to measure the accuracy by")
    skipped = {each.name for each in run.named_bad_files()}
    if skipped:
        what = f"warning  {len(skipped):,} bad image{'s' * (len(skipped) > 1)} left out, named in "
        report.say(f"{what}{run.path / 'bad_files.txt'}", style="yellow")
    report.say(f"model    {run.best}")
    report.say(f"pictures {run.plots}: {', '.join(drawn)}")
    if test is not None and splits.test is not None:
        refuse_too_many(test.bad, splits.test, config.data.max_bad)
    if not in_study:
        _say_next(report, config, splits, run)
    return TrainResult(run.path, validation, test)


def _say_accuracy(report: Reporter, shown: Evaluation, *, is_test: bool, in_study: bool) -> None:
    wrong = int((shown.predictions != shown.labels).sum())
    top5 = "" if shown.top5 is None else f", top-5 {shown.top5:.2%}"
    if not is_test and not in_study:
        report.say("the data has no test images; this is the accuracy on the validation images,")
        report.say("by which the weights were chosen, so expect somewhat less on new ones")
    line = f"{'test' if is_test else 'validation'} accuracy {shown.top1:.2%}{top5} "
    line += f"({len(shown.labels) - wrong} of {plural(len(shown.labels), 'image')} right)"
    report.say(line, style="bold green")
    for line in shown.warnings():
        report.say(f"warning  {line}", style="yellow")


def _say_next(report: Reporter, config: TrainConfig, splits: Splits, run: RunFolder) -> None:
    """Says what to type next: commands that work as they stand."""
    example = splits.test or splits.validation or splits.train
    held_out = example is splits.validation and splits.held_out  # images without a name as data
    if Path(example.item_name(0)).is_file():
        name = example.item_name(0)
    elif held_out:
        has_split = parse_name(config.data.source).split is not None
        name = config.data.source if has_split else f"{config.data.source}:train"
    else:
        name = example.name
    report.say("next")
    mixer = _command()
    report.say(f"         {shlex.join([mixer, 'predict', str(run.path), name])}")
    if example is not splits.train:
        source = parse_name(config.data.source).source if held_out else config.data.source
        data = f"{source}:{'test' if example is splits.test else 'validation'}"
        report.say(f"         {shlex.join([mixer, 'evaluate', str(run.path), '--data', data])}")
    if names_source(config.data.source):
        report.say(f"         {mixer} train --data FOLDER --image-size 64     (your own images)")
