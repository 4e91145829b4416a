"""The job of a folder of part files: what it is, which parts are missing, and what is refused.

The manifest is written before the first part and never after. It holds all that the rows depend on;
a command with another model, other images or other settings is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allmlp.data.fingerprint import fingerprint
from allmlp.data.source import Source
from allmlp.deploy.answers import Question, device_of, identity
from allmlp.deploy.tables import FILE_FORMATS, PART_FORMATS, check_format, writing
from allmlp.environment import environment_info
from allmlp.errors import UserError
from allmlp.io import STANDARD_OUTPUT, atomic_write, check_output_folder, expand, parse_json
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.names import is_format

if TYPE_CHECKING:  # one process needs no collectives
    from allmlp.runtime.world import World

MANIFEST = "manifest.json"
PART_SIZE = 10_000  # images, at most, where the user names no number
_FORMAT, _VERSION = "allmlp predictions", 1
_ANOTHER = "Give another --output, or the model, images and settings that it was begun with"


@dataclass(frozen=True)
class Plan:
    """What is to be written.

    Attributes:
        folder: of the parts.
        suffix: of each, with the dot.
        images: in all parts.
        part_size: images a part; the last may have fewer.
        missing: the numbers of the parts that are not there yet.
    """

    folder: Path
    suffix: str
    images: int
    part_size: int
    missing: list[int]

    @property
    def parts(self) -> int:
        """How many parts there are to be."""
        return math.ceil(self.images / self.part_size)

    def path(self, part: int) -> Path:
        """Returns the file of a part."""
        return self.folder / f"part-{part:05d}-of-{self.parts:05d}{self.suffix}"

    def bad_path(self, part: int) -> Path:
        """Returns the file of a part's bad images, which is there where it has some."""
        return self.folder / f"bad-{part:05d}-of-{self.parts:05d}.csv"

    def bounds(self, part: int) -> tuple[int, int]:
        """Returns the first image of a part, and the one behind its last."""
        return part * self.part_size, min((part + 1) * self.part_size, self.images)

    def count(self, parts: Iterable[int]) -> int:
        """Returns how many images some parts have."""
        return sum(stop - first for first, stop in map(self.bounds, parts))

    def share(self, world: World | None) -> list[int]:
        """Returns the missing parts that a process is to write."""
        return self.missing if world is None else self.missing[world.rank :: world.size]


def is_folder(output: str | Path) -> bool:
    """Returns whether an output is to be a folder of parts: it is one, or it has no ending."""
    path = expand(output)
    if path.suffix in FILE_FORMATS or str(output) == STANDARD_OUTPUT:
        return False
    return str(output).endswith(("/", os.sep)) or not path.suffix or path.is_dir()


def check_folder(output: str | Path, kind: str = "csv", part_size: int | None = None) -> Path:
    """Returns the path of a folder that parts can be written to; nothing is made yet.

    Args:
        output: the folder.
        kind: one of `PART_FORMATS`.
        part_size: images a part; None chooses.

    Raises:
        UserError: a value is not one, or the folder is a file, cannot be written to, or holds
            something else than such parts.
    """
    if kind not in PART_FORMATS:
        fix = f"Known: {', '.join(PART_FORMATS)}"
        raise UserError(f"unknown format of parts {kind!r}", where="--format", fix=fix)
    if part_size is not None and part_size < 1:
        raise UserError(f"part_size must be at least 1, got {part_size}", where="--part-size")
    check_format(f".{kind}")
    folder = expand(output)
    check_output_folder(folder)
    if folder.is_dir() and not (folder / MANIFEST).exists():
        other = next((each for each in os.listdir(folder) if each[0] != "."), None)
        if other is not None:
            what = f"the output's folder holds something else, such as {other!r}"
            raise UserError(what, where=folder, fix="Give a folder that is new or empty")
    return folder


def describe(model: ImageClassifier, source: Source, question: Question) -> dict[str, Any]:
    """Returns what the rows of a job depend on, as JSON values, and under "about" what they do not.

    Batch size, workers and device are left out: they change a probability in its last digits only,
    and a job that ran out of memory is to go on with a smaller batch.
    """
    names = "\n".join(model.class_names or []).encode(errors="surrogateescape")
    return {
        "model": {"sha256": identity(model), "classes": hashlib.sha256(names).hexdigest()},
        "images": {"number": len(source), "sha256": fingerprint(source)},
        "settings": {
            "answer": "features" if question.features else "classes",
            "top_k": question.top_k,
            "precision": question.precision,
            "preprocessing": json.loads(json.dumps(preprocessing_of(model).to_json())),
        },
        "about": {
            "model": str(getattr(model, "source", None)),
            "runtime": getattr(model, "runtime", None),  # of an exported file
            "images": source.name,
            "width": question.width,
            "environment": environment_info(device_of(model)),
        },
    }


def open_plan(folder: Path, job: dict[str, Any], kind: str, part_size: int | None) -> Plan:
    """Returns which parts of a job are missing; begins the job where the folder has none.

    Raises:
        UserError: the folder holds another job, or cannot be written to.
    """
    path, number = folder / MANIFEST, job["images"]["number"]
    if path.exists():
        begun = _read(path)
        table = {"format": kind, "part_size": part_size or begun["table"]["part_size"]}
        _refuse_another(begun, {**job, "table": table}, folder)
    else:
        assert part_size is not None
        table = {"format": kind, "part_size": part_size}
        values = {"format": _FORMAT, "version": _VERSION, **job, "table": table}
        text = json.dumps(values, indent=1) + "\n"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, text.encode(errors="surrogateescape"))
    plan = Plan(folder, f".{kind}", number, table["part_size"], [])
    missing = [part for part in range(plan.parts) if not plan.path(part).exists()]
    return Plan(folder, plan.suffix, number, plan.part_size, missing)


def choose_part_size(images: int, batch_size: int, processes: int) -> int:
    """Returns how many images a part is to have where nobody says it.

    Whole batches, and a few parts for each process: a kill loses one, and none waits long.
    """
    wanted = min(PART_SIZE, math.ceil(images / (4 * processes)))
    return max(1, math.ceil(wanted / batch_size)) * batch_size


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the manifest: {error.strerror}", where=path) from error
    except ValueError as error:
        what = f"the manifest is damaged: {str(error)[:200]}"
        raise UserError(what, where=path, fix="Give another --output") from error
    if not isinstance(values, dict) or not is_format(values.get("format"), _FORMAT):
        what = "the output's folder holds something else: not a manifest of predictions"
        raise UserError(what, where=path, fix="Give a folder that is new or empty")
    if values.get("version") != _VERSION:
        what = f"begun by another allmlp (version {str(values.get('version'))[:20]})"
        raise UserError(what, where=path, fix="Give another --output")
    table = values.get("table")
    size = table.get("part_size") if isinstance(table, dict) else None
    if not isinstance(size, int) or size < 1:
        raise UserError("the manifest is damaged: no part_size", where=path, fix=_ANOTHER)
    return values


def _refuse_another(begun: dict[str, Any], job: dict[str, Any], folder: Path) -> None:
    for group in ("model", "images", "settings", "table"):
        was, now = begun.get(group), job[group]
        if was == now:
            continue
        was = was if isinstance(was, dict) else {}
        key = next(each for each in [*now, *was] if was.get(each) != now.get(each))
        if group == "model":
            changed = "its class names are others" if key == "classes" else "it is another model"
        elif group == "images":
            changed = "the images are others"
            if key == "number":
                changed += f": there were {was.get(key)}, and now {now[key]}"
        else:
            changed = f"{key} was {was.get(key)} and is now {now.get(key)}"
        raise UserError(f"the folder holds another job: {changed}", where=folder, fix=_ANOTHER)
