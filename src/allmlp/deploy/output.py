"""Where predictions go: one file, standard output, or a folder of parts that can be resumed.

    FOLDER/manifest.json               the job: model, images, settings, number of parts
    FOLDER/part-00000-of-00012.csv     the rows of images 0 to part_size - 1, and so on
    FOLDER/bad-00000-of-00012.csv      the bad images of that part, if it has any

A single file is written as one part without a manifest. A part is written atomically, so that one
that exists is complete. The same command again writes the missing ones; another model, other images
or other settings are an error. Batches never cross from one part into the next, so that a part has
the same bytes whichever parts existed before and whichever process wrote it.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.fingerprint import fingerprint
from allmlp.data.source import BadImage, Source, subset
from allmlp.deploy.exported_model import ExportedModel
from allmlp.deploy.rows import Columns, Rows, predict_rows
from allmlp.deploy.tables import WRITERS, check_table, write_table, writing
from allmlp.environment import environment_info
from allmlp.errors import UserError, at_least, one_of
from allmlp.evaluation.features import weights_hash
from allmlp.evaluation.predictor import Predictor
from allmlp.io import (
    STANDARD_OUTPUT,
    atomic_write,
    check_output_file,
    check_output_folder,
    expand,
    parse_json,
    remove_stale,
)
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.names import is_format
from allmlp.runtime.world import World

MANIFEST = "manifest.json"
PART_SIZE = 10_000  # images, at most, unless the user gives a number
_FORMAT, _VERSION = "allmlp predictions", 1
_ANOTHER = "Give another output, or the model, images and settings that it was begun with"

OnRows = Callable[[Rows], object]


@dataclass(frozen=True)
class Output:
    """What is to be written."""

    path: Path | None  # of the file or the folder; None is standard output
    suffix: str  # the format of the rows, with the dot
    is_folder: bool = False  # of parts
    images: int = 0  # in all parts
    part_size: int | None = None  # images per part; the last may have fewer
    missing: tuple[int, ...] = (0,)  # the numbers of the parts that do not exist yet

    @property
    def parts(self) -> int:
        """How many parts there will be."""
        return math.ceil(self.images / (self.part_size or 1)) if self.is_folder else 1

    def part(self, number: int, kind: str = "part") -> Path | None:
        """Returns the file of a part, or with "bad" that of its bad images."""
        if not self.is_folder:
            return self.path
        assert self.path is not None
        suffix = self.suffix if kind == "part" else ".csv"
        return self.path / f"{kind}-{number:05d}-of-{self.parts:05d}{suffix}"

    def images_of(self, number: int) -> range:
        """Returns the indices of a part's images."""
        if not self.is_folder:
            return range(self.images)
        assert self.part_size is not None
        return range(number * self.part_size, min((number + 1) * self.part_size, self.images))

    def share(self, world: World) -> tuple[int, ...]:
        """Returns the missing parts that a process is to write."""
        return self.missing[world.rank :: world.size]


def choose_output(
    output: str | Path | None,
    format: str | None = None,
    part_size: int | None = None,
    *,
    overwrite: bool = False,
) -> Output | None:
    """Returns where rows go: None nowhere; nothing is made yet.

    A name without an ending is a folder, as is one that ends in a slash or exists as one.
    """
    at_least("part_size", part_size, 1)
    if output is None:
        return None
    path = expand(output)
    if str(output) == STANDARD_OUTPUT:
        return Output(None, f".{one_of('format', format or 'csv', ('csv', 'jsonl'))}")
    is_folder = str(output).endswith(("/", os.sep)) or not path.suffix or path.is_dir()
    if path.suffix in WRITERS or not is_folder:
        fix = f"Known: {', '.join(WRITERS)}, or a folder"
        if path.suffix not in WRITERS:
            what = f"unknown output format {path.suffix!r}"
            raise UserError(what, where=path, fix=fix, code="unknown-name")
        if format is not None and f".{format}" != path.suffix:
            what = f"format {format} does not agree with the ending of the output"
            raise UserError(what, where=path, fix=f"Leave format out, or end it in .{format}")
        check_output_file(path, overwrite=overwrite)
        check_table(path.suffix)
        return Output(path, path.suffix)
    kind = one_of("format of parts", format or "csv", ("csv", "jsonl", "parquet"))
    check_table(f".{kind}")
    check_output_folder(path)
    if path.is_dir() and not (path / MANIFEST).exists():
        other = next((name for name in os.listdir(path) if name[0] != "."), None)
        if other is not None:
            what = f"the output's folder holds something else, such as {other!r}"
            raise UserError(what, where=path, fix="Give a folder that is new or empty")
    return Output(path, f".{kind}", True, part_size=part_size)


def write_output(
    predictor: Predictor,
    source: Source,
    columns: Columns,
    output: Output,
    world: World | None = None,
    *,
    on_start: Callable[[Output], object] = lambda output: None,
    on_rows: OnRows = lambda rows: None,
) -> Output:
    """Writes the rows that are missing, all processes together; returns when all are there.

    `on_start` is called before the first part, `on_rows` with every batch of this process.
    """
    world = world or World()
    if output.is_folder:
        output = world.broadcast_from_rank0(
            lambda: _begin(predictor, source, columns, output, world.size)
        )
    else:
        output = replace(output, images=len(source))
    on_start(output)
    mine = output.share(world)
    # One loader for all parts keeps its workers busy from one to the next.
    fits = not output.is_folder or (output.part_size or 1) % predictor.batch_size == 0
    try:
        for group in [mine] if fits else [(part,) for part in mine]:
            if group:
                _write_group(predictor, source, columns, output, group, on_rows)
    except UserError as error:
        if world.is_main:
            raise
        what = f"rank {world.rank}: {error.what}"
        raise UserError(what, where=error.where, fix=error.fix, code=error.code) from error
    if output.is_folder:
        _wait_for_all(output, world)
        if world.is_main and output.path is not None:
            remove_stale(output.path)
    return output


def _write_group(
    predictor: Predictor,
    source: Source,
    columns: Columns,
    output: Output,
    group: tuple[int, ...],
    on_rows: OnRows,
) -> None:
    """Writes some parts with one loader."""
    images = source
    if output.is_folder:
        indices = np.concatenate([np.array(output.images_of(part), np.int64) for part in group])
        images = subset(source, indices, source.name)
    rows = watched(predict_rows(predictor, images, columns), on_rows)
    with contextlib.closing(rows) as batches:
        for part in group:
            indices = output.images_of(part)
            mine = itertools.islice(batches, math.ceil(len(indices) / predictor.batch_size))
            if not output.is_folder:
                write_table(output.path, output.suffix, mine, columns)
                continue
            bad = _BadRows(indices.start)
            finish = functools.partial(bad.write, output.part(part, "bad"))
            write_table(output.part(part), output.suffix, bad.seen_in(mine), columns, finish)


def watched(batches: Generator[Rows, None, None], on_rows: OnRows) -> Generator[Rows, None, None]:
    """Yields the same batches, and calls a function with each."""
    with contextlib.closing(batches):  # their workers end with whoever takes them
        for rows in batches:
            on_rows(rows)
            yield rows


class _BadRows:
    """The rows with an error of a part whose images begin at an index."""

    def __init__(self, first: int) -> None:
        self._next = first
        self._file = io.StringIO()
        self._writer = csv.writer(self._file, lineterminator="\n")

    def seen_in(self, batches: Iterable[Rows]) -> Iterator[Rows]:
        """Yields the same batches."""
        for rows in batches:
            bad = ((index, row) for index, row in enumerate(rows, self._next) if row.error)
            self._writer.writerows((index, row.path, row.error) for index, row in bad)
            self._next += len(rows)
            yield rows

    def write(self, path: Path | None) -> None:
        """Writes the file, or removes an older one if there are none."""
        assert path is not None
        text = self._file.getvalue()
        if text:
            atomic_write(path, f"index,path,error\n{text}".encode(errors="surrogateescape"))
        else:
            path.unlink(missing_ok=True)


def read_bad(output: Output, most: int) -> tuple[int, list[BadImage]]:
    """Returns how many images of a complete folder are bad, whoever found them, and the first."""
    number, first = 0, []
    for part in range(output.parts):
        path = output.part(part, "bad")
        if path is None or not path.exists():
            continue
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            for row in csv.DictReader(file):
                if number < most:
                    first.append(BadImage(int(row["index"]), row["path"], row["error"]))
                number += 1
    return number, first


def _wait_for_all(output: Output, world: World) -> None:
    """Waits for the parts of the others by their files.

    In a collective a process may wait half an hour only, and the slowest may need more.
    """
    paths = [path for path in map(output.part, output.missing) if path is not None]
    wanted = {path.name for path in paths}
    while world.size > 1 and output.path is not None:
        if wanted <= set(os.listdir(output.path)):
            return
        dead = [rank for rank in world.dead_ranks() if rank != world.rank]
        if dead and not wanted <= set(os.listdir(output.path)):
            what = f"rank {dead[0]} ended before its parts were written"
            raise UserError(what, where=output.path, fix="The same command again resumes")
        time.sleep(0.1)


# --- the manifest ---------------------------------------------------------------------------------


def identity(model: ImageClassifier) -> str:
    """Returns the sha256 of all that a model is: its architecture and weights, or its file."""
    if not isinstance(model, ExportedModel):
        return weights_hash(model)
    digest, file = hashlib.sha256(), Path(str(model.source))
    for path in (file, file.with_suffix(".bin")):  # of OpenVINO's two the second has the weights
        if path.exists() and (path == file or file.suffix == ".xml"):
            with path.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _begin(
    predictor: Predictor, source: Source, columns: Columns, output: Output, processes: int
) -> Output:
    """Returns the output with what is missing; writes the manifest if there is none."""
    folder, number, size = output.path, len(source), output.part_size
    assert folder is not None
    path = folder / MANIFEST
    job = _job(predictor, source, columns)
    table = {"format": output.suffix[1:], "part_size": size}
    if path.exists():
        begun = _read(path)
        table["part_size"] = size = size or begun["table"]["part_size"]
        _check_same(begun, {**job, "table": table}, folder)
    else:
        size = table["part_size"] = size or choose_part_size(
            number, predictor.batch_size, processes
        )
        values = {"format": _FORMAT, "version": _VERSION, **job, "table": table}
        text = json.dumps(values, indent=1) + "\n"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, text.encode(errors="surrogateescape"))
    output = replace(output, images=number, part_size=size)
    existing = set(os.listdir(folder))
    parts = ((part, output.part(part)) for part in range(output.parts))
    missing = tuple(part for part, path in parts if path and path.name not in existing)
    return replace(output, missing=missing)


def choose_part_size(images: int, batch_size: int, processes: int) -> int:
    """Returns the number of images per part unless the user gives it.

    Whole batches, and a few parts for each process: a kill loses one, and none waits long.
    """
    wanted = min(PART_SIZE, math.ceil(images / (4 * processes)))
    return max(1, math.ceil(wanted / batch_size)) * batch_size


def _job(predictor: Predictor, source: Source, columns: Columns) -> dict[str, Any]:
    """Returns what the rows depend on, as JSON values, and under "about" what they do not.

    Batch size, workers and device are left out: they change a probability in its last digits only,
    and a job that ran out of memory may resume with a smaller batch.
    """
    model = predictor.model
    names = "\n".join(model.class_names or []).encode(errors="surrogateescape")
    is_exported = isinstance(model, ExportedModel)
    return {
        "model": {"sha256": identity(model), "classes": hashlib.sha256(names).hexdigest()},
        "images": {"number": len(source), "sha256": fingerprint(source)},
        "settings": {
            "answer": "features" if columns.features else "classes",
            "top_k": columns.top_k,
            "precision": None if is_exported else predictor.precision,
            "preprocessing": json.loads(json.dumps(preprocessing_of(model).to_json())),
        },
        "about": {
            "model": str(getattr(model, "source", None)),
            "runtime": model.runtime if is_exported else None,
            "images": source.name,
            "width": columns.width,
            "environment": environment_info(predictor.device),
        },
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_bytes())
        if not isinstance(values, dict) or not is_format(values.get("format"), _FORMAT):
            raise ValueError("it is not a manifest of predictions")
        if values.get("version") != _VERSION:
            raise ValueError(f"another allmlp wrote it, version {str(values.get('version'))[:20]}")
        if not isinstance(values["table"]["part_size"], int) or values["table"]["part_size"] < 1:
            raise ValueError("it has no part_size")
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"the manifest cannot be used: {str(error)[:200]}"
        raise UserError(what, where=path, fix="Give another output", code="damaged") from error
    return values


def _check_same(begun: dict[str, Any], job: dict[str, Any], folder: Path) -> None:
    for group in ("model", "images", "settings", "table"):
        was, now = begun.get(group), job[group]
        if was == now:
            continue
        was = was if isinstance(was, dict) else {}
        key = next(key for key in [*now, *was] if was.get(key) != now.get(key))
        if group == "model":
            changed = "the class names differ" if key == "classes" else "it has another model"
        elif group == "images":
            changed = "the images differ"
            if key == "number":
                changed += f": {was.get(key)} then, {now[key]} now"
        else:
            changed = f"{key} was {was.get(key)} and is now {now.get(key)}"
        what = f"the folder holds another job: {changed}"
        raise UserError(what, where=folder, fix=_ANOTHER, code="another-job")
