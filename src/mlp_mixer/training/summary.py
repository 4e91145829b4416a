"""What a run says before it begins, and what it measures, draws, writes and says at its end."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mlp_mixer.console import Reporter
from mlp_mixer.data.items import Source
from mlp_mixer.data.source_names import parse_name
from mlp_mixer.data.sources import names_source
from mlp_mixer.evaluation.accuracy import Evaluation, evaluate
from mlp_mixer.evaluation.pictures import save_figure, save_report
from mlp_mixer.evaluation.throughput import count_parameters, flops_text
from mlp_mixer.models.layers import ImageClassifier
from mlp_mixer.training.card import model_card
from mlp_mixer.training.config import TrainConfig
from mlp_mixer.training.dataset import Splits
from mlp_mixer.training.pictures import curves
from mlp_mixer.training.run_folder import RunFolder
from mlp_mixer.weights.store import load_model


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        run_folder: where everything lies.
        validation: of the weights in best/.
        test: of the same weights; None where the data has no test images.
    """

    run_folder: Path
    validation: Evaluation
    test: Evaluation | None


def announce(
    report: Reporter,
    config: TrainConfig,
    splits: Splits,
    model: ImageClassifier,
    run: RunFolder,
    device: torch.device,
) -> None:
    """Says what was found and what will happen, before it happens."""
    height, width = model.config.image_size
    found = splits.describe()
    report.say(f"data     {config.data.source}: {found[0]}")
    for line in found[1:]:
        report.say(f"         {line}")
    report.say(
        f"model    {type(model).__name__}, {model.config.summary()}, {height}x{width} pixels: "
        f"{count_parameters(model):,} parameters, {flops_text(model.config.flops)} an image"
    )
    report.say(
        f"run      recipe {config.recipe}, seed {config.seed}: {config.epochs} epochs, "
        f"batch {config.batch_size}, {device}"
        + (f" ({_threads()})" if device.type == "cpu" else "")
        + ", float32"
    )
    report.say(f"results  {run.path}")


def _command() -> str:
    """How this machine's user starts `mixer`: with its path where it is not on the PATH."""
    started = Path(sys.argv[0])
    return str(started) if started.name == "mixer" and not shutil.which("mixer") else "mixer"


def _threads() -> str:
    threads = torch.get_num_threads()
    return "1 thread" if threads == 1 else f"{threads} threads"


def finish(
    config: TrainConfig, splits: Splits, run: RunFolder, report: Reporter, device: torch.device
) -> TrainResult:
    """Measures the best weights, draws the pictures, writes the card and says what to do next."""
    model = load_model(run.best)

    def measure(source: Source) -> Evaluation:
        return evaluate(
            model,
            source,
            batch_size=config.batch_size,
            num_workers=config.data.num_workers,
            allow_missing_classes=True,
            device=str(device),
            timeout=config.data.timeout,
        )

    validation = measure(splits.validation)
    test = None if splits.test is None else measure(splits.test)
    for each in test.bad if test is not None else []:  # those of validation were named before
        run.log_bad_file(each)
        report.say(f"left out of the accuracy: {each.name}: {each.what}", style="yellow")
    shown, source = (validation, splits.validation) if test is None else (test, splits.test)
    assert source is not None
    shown.save(run.path / ("validation" if test is None else "test"))
    save_figure(curves(run.path), run.plots / "curves.png")
    drawn = ["train_batch", "curves", *save_report(shown, source, run.plots)]
    run.write_card(model_card(model, config, splits, str(run.best), validation, test))

    wrong = int((shown.predictions != shown.labels).sum())
    top5 = "" if shown.top5 is None else f", top-5 {shown.top5:.2%}"
    report.say("")
    if test is None:
        report.say("the data has no test images; this is the accuracy on the validation images,")
        report.say("by which the weights were chosen, so expect somewhat less on new ones")
    kind = "validation" if test is None else "test"
    line = f"{kind} accuracy {shown.top1:.2%}{top5} ({len(shown.labels) - wrong} of "
    report.say(f"{line}{len(shown.labels)} images right)", style="bold green")
    report.say(f"model    {run.best}")
    report.say(f"pictures {run.plots}: {', '.join(drawn)}")
    example = splits.test or splits.validation
    held_out = test is None and splits.held_out  # images that have no name as data
    data = None if held_out else f"{config.data.source}:{kind}"
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
    if data is not None:
        report.say(f"         {shlex.join([mixer, 'evaluate', str(run.path), '--data', data])}")
    if names_source(config.data.source):
        report.say(f"         {mixer} train --data FOLDER --image-size 64     (your own images)")
    return TrainResult(run.path, validation, test)
