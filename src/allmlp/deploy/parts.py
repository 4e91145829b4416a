"""Outputs of predict: a file, standard output, or a resumable folder of parts.

    FOLDER/manifest.json               the job: model, images, settings, number of parts
    FOLDER/part-00000-of-00012.csv     the rows of images 0 to part_size - 1, and so on
    FOLDER/bad-00000-of-00012.csv      the bad images of that part, if any

An existing part is complete, since it is written atomically. Batches never span two parts, so its
bytes do not depend on which parts existed before or which process wrote it.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.fingerprint import fingerprint
from allmlp.data.source import BadImage, Source, subset
from allmlp.deploy.formats import format_of
from allmlp.deploy.options import PredictOptions
from allmlp.deploy.rows import CANNOT_WRITE, FORMATS, Columns, Rows, predict_rows, write_table
from allmlp.environment import environment_info
from allmlp.errors import UserError, disk_errors, one_of
from allmlp.evaluation.features import weights_hash
from allmlp.evaluation.predictor import Predictor
from allmlp.io import (
    STANDARD_OUTPUT,
    atomic_write,
    check_output_file,
    check_output_folder,
    csv_text,
    expand,
    read_json,
    remove_stale,
    sha256_of,
)
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.names import import_extra, is_format
from allmlp.runtime.world import World

MANIFEST = "manifest.json"
PART_SIZE = 10_000  # maximum number of images by default
NAMED = 20  # bad images that are listed
_FORMAT, _VERSION = "allmlp predictions", 1
_ANOTHER = "Give another output, or the model, images and settings that it was begun with"


@dataclass(frozen=True)
class Output:
    path: Path | None  # file or folder; None is standard output
    suffix: str  # row format, with the dot
    is_folder: bool = False  # folder of parts
    images: int = 0  # over all parts
    part_size: int | None = None  # images per part (the last may have fewer)
    missing: tuple[int, ...] = ()  # numbers of the missing parts

    @property
    def parts(self) -> int:
        return math.ceil(self.images / (self.part_size or 1))

    def part(self, number: int, kind: str = "part") -> Path:
        """Returns the path of a part, or with kind "bad" of its bad images."""
        assert self.path is not None
        suffix = self.suffix if kind == "part" else ".csv"
        return self.path / f"{kind}-{number:05d}-of-{self.parts:05d}{suffix}"

    def images_of(self, number: int) -> range:
        assert self.part_size is not None
        return range(number * self.part_size, min((number + 1) * self.part_size, self.images))


def choose_output(options: PredictOptions) -> Output | None:
    """Returns the output for rows, None for none; creates nothing yet."""
    output, format = options.output, options.format
    if output is None:
        return None
    path, suffix = expand(output), f".{format or 'csv'}"
    if str(output) == STANDARD_OUTPUT:
        return Output(None, f".{one_of('format', format or 'csv', ('csv', 'jsonl'))}")
    is_folder = str(output).endswith(("/", os.sep)) or not path.suffix or path.is_dir()
    if path.suffix in FORMATS or not is_folder:
        is_folder = False
        one_of("output format", path.suffix, [*FORMATS, "a folder"], where=path)
        if format is not None and suffix != path.suffix:
            what = f"format {format} does not agree with the ending of the output"
            raise UserError(what, where=path, fix=f"Leave format out, or end it in {suffix}")
        suffix = path.suffix
        check_output_file(path, overwrite=options.overwrite)
    if suffix == ".parquet":
        import_extra("pyarrow.parquet", "data")
    if not is_folder:
        return Output(path, suffix)
    if options.overwrite:
        what = "overwrite has no effect on a folder of parts, which is completed"
        fix = "Remove the folder to compute all parts again, or leave out overwrite"
        raise UserError(what, where=path, fix=fix, code="conflict")
    check_output_folder(path)
    if path.is_dir() and not (path / MANIFEST).exists():
        other = next((name for name in os.listdir(path) if name[0] != "."), None)
        if other is not None:
            what = f"the output's folder holds something else, such as {other!r}"
            raise UserError(what, where=path, fix="Give a folder that is new or empty")
    return Output(path, suffix, True, part_size=options.part_size)


def write_parts(
    predictor: Predictor,
    source: Source,
    columns: Columns,
    output: Output,
    world: World,
    on_rows: Callable[[Rows], object],
) -> None:
    """Writes the missing parts across all processes; returns when all exist."""
    mine = output.missing[world.rank :: world.size]
    # One loader for all parts keeps its workers busy between parts.
    fits = (output.part_size or 1) % predictor.batch_size == 0
    try:
        for group in [mine] if fits and mine else [(part,) for part in mine]:
            indices = np.concatenate([np.array(output.images_of(part)) for part in group])
            images = subset(source, indices, source.name)
            with closing(predict_rows(predictor, images, columns, on_rows)) as batches:
                for part in group:
                    number = math.ceil(len(output.images_of(part)) / predictor.batch_size)
                    rows = _with_bad_images(itertools.islice(batches, number), output, part)
                    write_table(output.part(part), output.suffix, rows, columns)
    except UserError as error:
        if world.is_main:
            raise
        what = f"rank {world.rank}: {error.what}"
        raise UserError(what, where=error.where, fix=error.fix, code=error.code) from error
    _wait_for_all(output, world)
    if world.is_main:
        assert output.path is not None
        remove_stale(output.path)


def _with_bad_images(batches: Iterable[Rows], output: Output, part: int) -> Iterator[Rows]:
    bad: list[tuple[object, ...]] = [("index", "path", "error")]
    index = output.images_of(part).start
    for rows in batches:
        bad += [(at, row.path, row.error) for at, row in enumerate(rows, index) if row.error]
        index += len(rows)
        yield rows
    path = output.part(part, "bad")
    if len(bad) > 1:
        atomic_write(path, csv_text(bad))
    else:
        path.unlink(missing_ok=True)


def read_bad(output: Output) -> tuple[int, list[BadImage]]:
    bad: list[BadImage] = []
    number = 0
    for path in filter(Path.exists, (output.part(part, "bad") for part in range(output.parts))):
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            for index, name, error in itertools.islice(csv.reader(file), 1, None):
                number += 1
                if len(bad) < NAMED:
                    bad.append(BadImage(int(index), name, error))
    return number, bad


def _wait_for_all(output: Output, world: World) -> None:
    """Polls for the parts of other processes: a collective times out after half an hour."""
    wanted = {output.part(part).name for part in output.missing}
    while world.size > 1 and output.path is not None:
        dead = [rank for rank in world.dead_ranks() if rank != world.rank]
        if wanted <= set(os.listdir(output.path)):
            return
        if dead:
            what = f"rank {dead[0]} ended before its parts were written"
            raise UserError(what, where=output.path, fix="The same command again resumes")
        time.sleep(0.1)


# --- manifest -------------------------------------------------------------------------------------


def begin_parts(
    predictor: Predictor, source: Source, columns: Columns, output: Output, processes: int
) -> Output:
    """Returns the output with its missing parts; writes the manifest if it does not exist."""
    folder, number, size = output.path, len(source), output.part_size
    assert folder is not None
    path, job = folder / MANIFEST, _job(predictor, source, columns)
    begun = None
    if path.exists():
        begun = read_json(path, "the manifest cannot be used", _ANOTHER)
        begun = begun if isinstance(begun, dict) else {}
        table = begun.get("table", {})
        is_known = is_format(begun.get("format"), _FORMAT) and begun.get("version") == _VERSION
        if not (is_known and "part_size" in table):
            raise UserError("the manifest cannot be used", where=path, fix=_ANOTHER, code="damaged")
        size = size or table["part_size"]
    elif size is None:
        # Whole batches, and a few parts per process: a kill loses one part, and no process idles.
        wanted = min(PART_SIZE, math.ceil(number / (4 * processes)))
        size = max(1, math.ceil(wanted / predictor.batch_size)) * predictor.batch_size
    job["table"] = {"format": output.suffix[1:], "part_size": size}
    if begun is not None:
        _check_same(begun, job, folder)
    else:
        text = json.dumps({"format": _FORMAT, "version": _VERSION, **job}, indent=1) + "\n"
        with disk_errors(CANNOT_WRITE, folder):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, text)
    output = replace(output, images=number, part_size=size)
    existing = set(os.listdir(folder))
    missing = (part for part in range(output.parts) if output.part(part).name not in existing)
    return replace(output, missing=tuple(missing))


def _job(predictor: Predictor, source: Source, columns: Columns) -> dict[str, Any]:
    """Returns everything the rows depend on as JSON values, and other facts under "about".

    Batch size, workers and device only change the last digits.
    """
    model = predictor.model
    names = "\n".join(model.class_names or []).encode(errors="surrogateescape")
    is_file = not isinstance(model, ImageClassifier)
    return {
        "model": {
            "sha256": _hash_of_file(str(model.source)) if is_file else weights_hash(model),
            "classes": hashlib.sha256(names).hexdigest(),
        },
        "images": {"number": len(source), "sha256": fingerprint(source)},
        "settings": {
            "answer": "features" if columns.features else "classes",
            "top_k": None if columns.features else columns.width,
            "precision": None if is_file else predictor.precision,
            "preprocessing": json.loads(json.dumps(preprocessing_of(model).to_json())),
            "decision": columns.decision.to_json() or None,  # None in earlier manifests too
        },
        "about": {
            "model": str(model.source),
            "runtime": model.runtime,
            "images": source.name,
            "width": columns.width,
            "environment": environment_info(predictor.device),
        },
    }


def _hash_of_file(name: str) -> str:
    """Returns the sha256 of an exported file, with OpenVINO's weights, which are in .bin."""
    sums = [bytes.fromhex(sha256_of(file)) for file in format_of(name).files(Path(name))]
    return hashlib.sha256(b"".join(reversed(sums))).hexdigest()


def _check_same(begun: dict[str, Any], job: dict[str, Any], folder: Path) -> None:
    """Raises UserError with the first value of a job that differs from the folder's manifest."""
    for group in ("model", "images", "settings", "table"):
        was, now = begun.get(group) or {}, job[group]
        for key in now:
            if was.get(key) == now[key]:
                continue
            changed = f"{key} was {was.get(key)} and is now {now[key]}"
            if key in ("sha256", "classes"):
                changed = f"the {'class names' if key == 'classes' else group} differ"
            what = f"the folder holds another job: {changed}"
            raise UserError(what, where=folder, fix=_ANOTHER, code="another-job")
