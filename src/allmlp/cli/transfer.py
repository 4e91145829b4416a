"""`mixer transfer`."""

from __future__ import annotations

from typing import Annotated, Literal

from tyro.conf import Positional, arg

from allmlp.cli.arguments import (
    Assignments,
    File,
    Folder,
    Number,
    Rates,
    Seeds,
    Size,
    Text,
    parse_size,
)
from allmlp.cli.vtab import Tasks, computing, rates_of, required

Checkpoint = Annotated[Positional[str], arg(metavar="CHECKPOINT")]


def transfer(
    checkpoint: Checkpoint,
    /,
    *,
    suite: str = "avg5",
    task: Tasks = (),
    tasks: File = None,
    output: Folder = None,
    image_size: Size = None,
    resize: Literal["resmall-crop", "resize-crop", "squash"] = "resmall-crop",
    steps: Number = None,
    batch_size: Number = None,
    grid: Rates = None,
    seeds: Seeds = (),
    device: Text = None,
    num_workers: Number = None,
    settings: Assignments = (),
) -> None:
    """Fine-tune a checkpoint on ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers: "Avg 5".

    Examples of use:
        mixer transfer mixer_b16.i21k --tasks tasks.json --output runs/avg5
        mixer transfer mixer_b16.i21k --task pets=FOLDER --task cifar10=FILES --output runs/two
        mixer transfer runs/mine --tasks tasks.json --output runs/large --image-size 448

    The tasks are imagenet, cifar10, cifar100, pets and flowers102. The rate is chosen on held-out
    training images; then a run for each seed trains on all of them. The mean of fewer than five is
    marked partial. The same command goes on where it was stopped; tasks may be added.

    Args:
        checkpoint: a run folder, a weights file, a name of `mixer models --weights`, or
            hf:owner/name.
        suite: avg5.
        task: the data of a task; may be given many times. Any source that the verb train reads.
        tasks: a JSON file of the same, {"pets": "FOLDER"}; its paths are relative to its folder.
        output: the folder of the suite.
        image_size: what the model sees (224; 448 in the paper's Table 2).
        resize: how test pictures come to that size: resmall-crop (the paper's Table 3), resize-crop
            (its Table 2) or squash.
        steps: of every run, in place of each set's; the warm-up keeps its share.
        batch_size: images a step.
        grid: learning rates to choose from; a single one is taken as it is.
        seeds: of the final runs (0 1 2).
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
        settings: any other setting, as config.json of a run names it; may be given many times.
    """
    from allmlp.errors import UserError
    from allmlp.studies.task_sources import named_tasks
    from allmlp.studies.transfer import SUITES
    from allmlp.studies.transfer import transfer as run_suite

    name, folder = required(checkpoint, output, "transfer")
    if suite not in SUITES:
        fix = f"Known: {', '.join(SUITES)}; VTAB-1k has a verb of its own: mixer vtab"
        raise UserError(f"unknown suite {suite!r}", where="--suite", fix=fix)
    run_suite(
        name,
        named_tasks(task, tasks, SUITES[suite]),
        folder,
        suite=suite,
        image_size=parse_size(image_size),
        resize=resize,
        steps=steps,
        batch_size=batch_size,
        grid=rates_of(grid),
        seeds=seeds,
        changes=computing(device, num_workers),
        settings=settings,
    )
