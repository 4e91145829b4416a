"""`mixer vtab`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

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
from allmlp.errors import UserError

OptionalCheckpoint = Annotated[
    Positional[str | None], arg(help_behavior_hint="", metavar="[CHECKPOINT]")
]
Tasks = Annotated[UseAppendAction[tuple[str, ...]], arg(name="task", metavar="NAME=SOURCE")]
ListFlag = Annotated[bool, arg(name="list")]


def vtab(
    checkpoint: OptionalCheckpoint = None,
    /,
    *,
    task: Tasks = (),
    tasks: File = None,
    output: Folder = None,
    protocol: str = "paper",
    image_size: Size = None,
    steps: Number = None,
    batch_size: Number = None,
    grid: Rates = None,
    seeds: Seeds = (),
    device: Text = None,
    num_workers: Number = None,
    settings: Assignments = (),
    list_tasks: ListFlag = False,
) -> None:
    """Fine-tune a checkpoint on the 19 tasks of VTAB-1k, as many of them as you have.

    Examples of use:
        mixer vtab --list
        mixer vtab mixer_b16.i21k --tasks tasks.json --output runs/vtab
        mixer vtab mixer_b16.i21k --task pets=FOLDER --task svhn=hf:owner/name --output runs/vtab
        mixer vtab runs/mine --tasks tasks.json --protocol lightweight --output runs/light

    Each task has 800 images to learn from and 200 to choose the rate by, then all 1,000. The mean
    of fewer than 19 tasks is marked partial. The same command goes on where it was stopped; tasks
    may be added.

    Args:
        checkpoint: a run folder, a weights file, a name of `mixer models --weights`, or
            hf:owner/name.
        task: the data of a task; may be given many times. Any source that the verb train reads.
        tasks: a JSON file of the same, {"pets": "FOLDER"}; its paths are relative to its folder.
        output: the folder of the suite.
        protocol: paper (2,500 steps of 512 images, a grid of rates, three seeds, 224 or 448 pixels)
            or lightweight (1,000 steps of 64 images, one rate, one seed, 224 pixels).
        image_size: of every task, in place of the protocol's.
        steps: of every run; the warm-up keeps its share.
        batch_size: images a step.
        grid: learning rates to choose from; a single one is taken as it is.
        seeds: of the final runs.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
        settings: any other setting, as config.json of a run names it; may be given many times.
        list_tasks: list the tasks, and what data is expected for them.
    """
    if list_tasks:
        given = [checkpoint, task, tasks, output, image_size, steps, batch_size, grid, seeds]
        given += [device, num_workers, settings]
        if any(each not in (None, ()) for each in given) or protocol != "paper":
            raise UserError("--list goes alone", where="mixer vtab", fix="mixer vtab --list")
        from allmlp.studies.vtab_tasks import list_tasks as lines

        print("\n".join(lines()))
        return
    from allmlp.studies.task_sources import named_tasks
    from allmlp.studies.transfer import vtab as run_suite
    from allmlp.studies.vtab_tasks import VTAB

    name, folder = required(checkpoint, output, "vtab")
    run_suite(
        name,
        named_tasks(task, tasks, VTAB),
        folder,
        protocol=protocol,
        image_size=parse_size(image_size),
        steps=steps,
        batch_size=batch_size,
        grid=rates_of(grid),
        seeds=seeds,
        changes=computing(device, num_workers),
        settings=settings,
    )


def required(checkpoint: str | None, output: str | None, verb: str) -> tuple[str, str]:
    """Returns both.

    Raises:
        UserError: one of them is not given.
    """
    if checkpoint is None:
        fix = f"mixer {verb} CHECKPOINT --task NAME=SOURCE --output FOLDER"
        raise UserError("no checkpoint is named", where=f"mixer {verb}", fix=fix)
    if output is None:
        what = "a suite of many runs needs a folder with a name, so that it can go on"
        raise UserError(what, where="--output", fix="--output runs/NAME")
    return checkpoint, output


def rates_of(grid: tuple[float, ...] | None) -> tuple[float, ...]:
    """Returns the learning rates that --grid was given; () takes those of the suite.

    Raises:
        UserError: the flag has no values.
    """
    if grid == ():
        raise UserError("--grid has no values", fix="Give learning rates, or leave it out")
    return grid or ()


def computing(device: str | None, num_workers: int | None) -> dict[str, object]:
    """Returns the settings of where and how fast a run computes."""
    given = {"device": device, "data.num_workers": num_workers}
    return {name: value for name, value in given.items() if value is not None}
