"""Predictions in a folder of part files: restartable, and shared out among processes.

    FOLDER/manifest.json               the job: model, images, settings, how many parts
    FOLDER/part-00000-of-00012.csv     the rows of images 0 to part_size - 1, and so on
    FOLDER/bad-00000-of-00012.csv      the bad images of that part, where it has any

A part is written aside and renamed, so that one that is there is whole. The same command again
writes those that are missing; a job with another model, other images or other settings is refused.
Batches never cross from one part into the next, so that a part has the same bytes whichever parts
were there before and whoever wrote it.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from allmlp.data.source import BadImage, Source, subset
from allmlp.deploy.answers import Question, make_ready
from allmlp.deploy.plan import MANIFEST, Plan, choose_part_size, describe, open_plan
from allmlp.deploy.rows import OnRows, Rows, predict_rows, watched
from allmlp.deploy.tables import write_rows
from allmlp.errors import UserError
from allmlp.io import atomic_write, remove_stale
from allmlp.models.inference import Inference
from allmlp.models.layers import ImageClassifier

if TYPE_CHECKING:  # one process needs no collectives
    from allmlp.runtime.world import World


def predict_parts(
    model: ImageClassifier,
    source: Source,
    question: Question,
    folder: Path,
    *,
    kind: str = "csv",
    part_size: int | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    world: World | None = None,
    on_plan: Callable[[Plan], OnRows] | None = None,
) -> Plan:
    """Writes the parts that are missing, all processes together; returns when all are there.

    Args:
        model: on its device.
        source: the images.
        question: what is asked about each.
        folder: as `check_folder` gave it.
        kind: one of `PART_FORMATS`.
        part_size: images a part; None takes that of the folder, or chooses.
        batch_size, num_workers: of this process, as of `predict_rows`.
        world: the processes that share the work; None for this one alone.
        on_plan: called before the first part; returns what is then called with the rows of every
            batch that this process writes.

    Raises:
        UserError: the folder holds another job, or cannot be written to; another process ended.
    """

    def begin() -> Plan:
        job = describe(model, source, question)
        wanted = part_size
        if wanted is None and not (folder / MANIFEST).exists():
            processes = 1 if world is None else world.size
            wanted = choose_part_size(len(source), batch_size, processes)
        return open_plan(folder, job, kind, wanted)

    plan = begin() if world is None else world.broadcast_from_rank0(begin)
    on_rows = None if on_plan is None else on_plan(plan)
    mine = plan.share(world)
    # One loader for all parts keeps its workers busy from one to the next.
    in_step = plan.part_size % batch_size == 0
    ready = make_ready(model, question)
    try:
        for group in [mine] if in_step else [[part] for part in mine]:
            if group:
                _write_group(ready, source, question, plan, group, batch_size, num_workers, on_rows)
    except UserError as error:
        if world is None or world.is_main:
            raise
        raise UserError(
            f"rank {world.rank}: {error.what}", where=error.where, fix=error.fix
        ) from error
    _wait_for_all(plan, world)
    if world is None or world.is_main:
        remove_stale(folder)
    return plan


def _write_group(
    ready: Inference,
    source: Source,
    question: Question,
    plan: Plan,
    group: list[int],
    batch_size: int,
    num_workers: int | None,
    on_rows: OnRows | None,
) -> None:
    indices = np.concatenate([np.arange(*plan.bounds(part)) for part in group])
    images = subset(source, indices, source.name)
    rows = predict_rows(
        ready.model,
        images,
        question,
        batch_size=batch_size,
        num_workers=num_workers,
        ready=ready,
    )
    with contextlib.closing(watched(rows, on_rows)) as batches:
        for part in group:
            first, stop = plan.bounds(part)
            mine = itertools.islice(batches, math.ceil((stop - first) / batch_size))
            bad: list[BadImage] = []
            write_rows(
                plan.path(part),
                plan.suffix,
                _noting_bad(mine, first, bad),
                question,
                then=functools.partial(_write_bad, plan.bad_path(part), bad),
            )


def _noting_bad(batches: Iterable[Rows], first: int, bad: list[BadImage]) -> Iterator[Rows]:
    """Yields the same batches, of images from the index `first` on, and notes the bad ones."""
    for rows in batches:
        for at, each in enumerate(rows):
            if each.error is not None:
                bad.append(BadImage(first + at, each.path, each.error))
        yield rows
        first += len(rows)


def _write_bad(path: Path, bad: list[BadImage]) -> None:
    if not bad:
        path.unlink(missing_ok=True)
        return
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["index", "path", "error"])
    writer.writerows((each.index, each.name, each.what) for each in bad)
    atomic_write(path, file.getvalue().encode(errors="surrogateescape"))


def bad_images(plan: Plan, most: int) -> tuple[int, list[BadImage]]:
    """Returns how many images of a whole job are bad, whoever came upon them, and the first ones.

    Args:
        plan: of which all parts are there.
        most: how many to name.
    """
    number, first = 0, []
    for part in range(plan.parts):
        path = plan.bad_path(part)
        if not path.exists():
            continue
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            for row in csv.DictReader(file):
                if number < most:
                    first.append(BadImage(int(row["index"]), row["path"], row["error"]))
                number += 1
    return number, first


def _wait_for_all(plan: Plan, world: World | None) -> None:
    """Waits for the parts of the others by their files.

    In a collective a process may wait half an hour only, and the slowest may need more.
    """
    wanted = {plan.path(part).name for part in plan.missing}
    while world is not None and world.size > 1:
        if wanted <= set(os.listdir(plan.folder)):
            return
        gone = [rank for rank in world.dead_ranks() if rank != world.rank]
        if gone and not wanted <= set(os.listdir(plan.folder)):
            what = f"rank {gone[0]} ended before its parts were written"
            raise UserError(what, where=plan.folder, fix="The same command again continues")
        time.sleep(0.1)
