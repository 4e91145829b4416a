"""Lists of images to exclude, in a text file that can be edited.

One line per image, `split<TAB>index<TAB>name<TAB>why`, below a header with the data the list was
made for. A list is not applied to other data; lines may be deleted to keep an image after all.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from allmlp.data.duplicates import Duplicates
from allmlp.data.fingerprint import own_names
from allmlp.data.source import Source, subset
from allmlp.errors import UserError
from allmlp.names import is_format

_TITLE = "# allmlp drop list 1"
_WHY = {"same file": "same file as", "same pixels": "same pixels as", "near": "near duplicate of"}
_FIX = "Make the list again: mixer data check SOURCE --exclude FILE"


@dataclass(frozen=True)
class Excluded:
    """An image to leave out, its name without the folder that all of its split share; and why."""

    split: str
    index: int
    name: str
    why: str


@dataclass(frozen=True)
class ExcludeList:
    """The images to leave out of a data set."""

    source: str
    splits: dict[str, tuple[int, str]]  # the number of images and the checksum of their names
    images: list[Excluded]
    path: Path | None = None  # that it was read from

    def to_text(self) -> str:
        """Returns the contents of the file."""
        lines = [_TITLE, f"# source\t{_escape(self.source)}"]
        lines += [f"# split\t{split}\t{n}\t{names}" for split, (n, names) in self.splits.items()]
        lines.append("# Delete a line to keep that image; change nothing else.")
        for image in self.images:
            lines.append("\t".join(_escape(str(cell)) for cell in vars(image).values()))
        return "".join(f"{line}\n" for line in lines)


def exclude_list(duplicates: Duplicates, source: str) -> ExcludeList:
    """Returns the list of what to leave out so that no duplicates remain."""
    own = {name: own_names(data) for name, data in duplicates.splits.items()}
    images: list[Excluded] = []
    for pair in duplicates.to_exclude():
        (kept, at), (split, index) = pair.first, pair.second
        why = f"{_WHY[pair.kind]} {kept}[{at}] {duplicates.splits[kept].item_name(at)}"
        images.append(Excluded(split, index, own[split][index], why))
    splits = {name: (len(own[name]), _checksum(own[name])) for name in duplicates.splits}
    return ExcludeList(source, splits, images)


def _checksum(names: list[str]) -> str:
    return hashlib.sha256(b"".join(os.fsencode(name) + b"\0" for name in names)).hexdigest()


def read_exclude_list(path: str | Path) -> ExcludeList:
    """Returns the list in a file."""
    path = Path(os.path.expanduser(path))
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        what = f"cannot read the list of images to exclude: {error.strerror}"
        raise UserError(what, where=path, fix=_FIX) from error
    lines = text.split("\n")
    if not is_format(lines[0].rstrip("\r"), _TITLE):
        raise UserError("not a list of images to exclude", where=path, fix=_FIX)
    source, splits, images = "", {}, []
    for number, line in enumerate(lines, start=1):
        cells = [_unescape(cell) for cell in line.rstrip("\r").split("\t")]
        try:
            if cells[0] == "# source":
                source = cells[1]
            elif cells[0] == "# split":
                splits[cells[1]] = (int(cells[2]), cells[3])
            elif line.strip() and line[0] != "#":
                split, index, name, why = cells
                if not 0 <= int(index) < splits[split][0]:
                    raise ValueError(line)
                images.append(Excluded(split, int(index), name, why))
        except (ValueError, LookupError) as error:
            what = f"line {number} of the list is damaged: {line[:100]!r}"
            raise UserError(what, where=path, fix=_FIX) from error
    return ExcludeList(source, splits, images, path)


def exclude(source: Source, excluded: ExcludeList, split: str) -> Source:
    """Returns a whole split without the images of the list, which must have been made for it."""
    where, own = excluded.path or "the list of images to exclude", own_names(source)
    mine = [image for image in excluded.images if image.split == split]
    problem = None
    if split not in excluded.splits:
        problem = f"it has no {split} split, only {', '.join(excluded.splits)}"
    elif excluded.splits[split][0] != len(own):
        number = excluded.splits[split][0]
        problem = f"its {split} has {number:,} images, {source.name} has {len(own):,}"
    elif excluded.splits[split][1] != _checksum(own):
        problem = f"images of the {split} split have other names"
    elif any(own[image.index] != image.name for image in mine):
        problem = f"lines of the {split} split have been changed"
    if problem is not None:
        raise UserError(f"the list was made for other data: {problem}", where=where, fix=_FIX)
    keep = np.ones(len(source), dtype=bool)
    keep[[image.index for image in mine]] = False
    if not keep.any():
        raise UserError(f"the list leaves no image of the {split} split", where=where)
    return subset(source, np.flatnonzero(keep), source.name)


def _escape(text: str) -> str:
    """The text on one line and without tabs."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def _unescape(text: str) -> str:
    letters = {"t": "\t", "n": "\n", "r": "\r"}
    return re.sub(r"\\(.)", lambda found: letters.get(found[1], found[1]), text)
