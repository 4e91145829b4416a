"""Fingerprints of data sets and images, and lists of images to exclude from a data set.

An exclude list is an editable text file, made for the data in its header, with one line per image,
`split<TAB>index<TAB>name<TAB>why`; delete a line to keep its image.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from allmlp.data.source import Source, subset
from allmlp.errors import UserError
from allmlp.names import is_format

_TITLE = "# allmlp drop list 1"
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_FIX = "Make the list again with mixer data check or mixer data mistakes"


def fingerprint(source: Source, most: int | None = 100, *, moved: bool = False) -> str:
    """Returns the sha256 of all names (`moved`: in the common folder), labels and `most` images."""
    digest = hashlib.sha256(f"{len(source)} {source.class_names}".encode(errors="surrogateescape"))
    names = own_names(source) if moved else map(source.item_name, range(len(source)))
    labels = source.labels
    if source.is_multi_label:
        labels = [row.tobytes().hex() for row in np.packbits(source.labels, axis=1)]
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{name}\t{label}\n".encode(errors="surrogateescape"))
    step = 1 if most is None else max(1, -(-len(source) // most))
    for index in range(0, len(source), step):
        try:
            digest.update(source.read(index))
        except UserError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def own_names(source: Source) -> list[str]:
    names = [source.item_name(index) for index in range(len(source))]
    start = os.path.commonprefix(names).rfind("/") + 1  # noqa: RUF071 - not all names are paths
    return [name[start:] for name in names]


def image_key(encoded: bytes) -> str:
    return hashlib.sha256(encoded).hexdigest()[:16]


# Exclude lists


def exclude_list(
    splits: Mapping[str, Source], images: Iterable[tuple[str, int, str]], source: str
) -> str:
    """Returns the text of a list of these images, (split, index, why), of the named data."""
    names = {split: own_names(data) for split, data in splits.items()}
    rows: list[tuple[object, ...]] = [(_TITLE,), ("# source", source)]
    rows += [("# split", split, len(own), _checksum(own)) for split, own in names.items()]
    rows.append(("# Delete a line to keep that image; change nothing else.",))
    rows += [(split, index, names[split][index], why) for split, index, why in images]
    escapes = str.maketrans(_ESCAPES)
    return "".join("\t".join(str(cell).translate(escapes) for cell in row) + "\n" for row in rows)


def _checksum(names: list[str]) -> str:
    return hashlib.sha256(b"".join(os.fsencode(name) + b"\0" for name in names)).hexdigest()


@dataclass(frozen=True)
class ExcludeList:
    path: Path
    splits: dict[str, tuple[int, str]]  # number of images and checksum of their names
    images: dict[str, dict[int, str]]  # split -> index -> name of an excluded image


def read_exclude_list(path: str | Path) -> ExcludeList:
    path = Path(os.path.expanduser(path))
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if not is_format(lines[0], _TITLE):
        raise UserError("not a list of images to exclude", where=path, fix=_FIX)
    found = ExcludeList(path, {}, {})
    for number, line in enumerate(lines, start=1):
        cells = [_unescape(cell) for cell in line.split("\t")]
        try:
            if cells[0] == "# split":
                found.splits[cells[1]], found.images[cells[1]] = (int(cells[2]), cells[3]), {}
            elif line.strip() and line[0] != "#":
                split, index, name, _ = cells
                found.images[split][int(index)] = name
        except (ValueError, LookupError) as error:
            what = f"line {number} of the list is damaged: {line[:100]!r}"
            raise UserError(what, where=path, fix=_FIX) from error
    return found


def exclude(source: Source, excluded: ExcludeList, split: str) -> Source:
    """Returns a full split without the excluded images; the list must have been made for it."""
    own, mine = own_names(source), excluded.images.get(split, {})
    number, checksum = excluded.splits.get(split, (0, ""))
    problem = None
    if number != len(own):
        problem = f"its {split} has {number:,} images, {source.name} has {len(own):,}"
    elif checksum != _checksum(own):
        problem = f"images of the {split} split have other names"
    elif any(own[at : at + 1] != [name] for at, name in mine.items()):
        problem = f"lines of the {split} split have been changed"
    if problem is not None:
        what = f"the list was made for other data: {problem}"
        raise UserError(what, where=excluded.path, fix=_FIX)
    if len(mine) == len(own):
        raise UserError(f"the list leaves no image of the {split} split", where=excluded.path)
    return subset(source, np.delete(np.arange(len(own)), list(mine)), source.name)


def _unescape(text: str) -> str:
    letters = {escape[1]: letter for letter, escape in _ESCAPES.items()}
    return re.sub(r"\\(.)", lambda found: letters.get(found[1], found[1]), text)
