"""Drop lists: which images to leave out because they are copies, in a text file that can be edited.

One line an image, `split<TAB>index<TAB>name<TAB>why`, below a header that says for which data the
list was made. A list is refused for other data; lines may be deleted to keep an image after all.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from allmlp.data.duplicates import Duplicates
from allmlp.data.fingerprint import own_names
from allmlp.data.items import Source, subset
from allmlp.errors import UserError
from allmlp.io import atomic_write
from allmlp.names import is_format

_TITLE = "# allmlp drop list 1"
_AS = {
    "same file": "same file as",
    "same pixels": "same pixels as",
    "near": "near duplicate of",
}
_FIX = "Make the list again: mixer data check SOURCE --drop-list FILE"
_PROTECTED = (
    "test",
    "validation",
)  # the most precious first: no image goes because of a lesser one


@dataclass(frozen=True)
class Dropped:
    """An image to leave out: its name without the folder that all of its split share, and why.

    `line` is where the file says so; 0 where there is no file.
    """

    split: str
    index: int
    name: str
    why: str
    line: int = 0


@dataclass(frozen=True)
class DropList:
    """The images to leave out of a data set.

    Attributes:
        source: what the data was called.
        splits: for each split the number of images and the fingerprint of their names.
        dropped: the images, by split and index.
        path: the file it was read from.
    """

    source: str
    splits: dict[str, tuple[int, str]]
    dropped: list[Dropped]
    path: Path | None = None


def drop_list(duplicates: Duplicates, source: str) -> DropList:
    """Returns which images to leave out so that no duplicates remain.

    Images of train that duplicate one of validation or test, images of validation that duplicate
    one of test, and later copies inside a split: an image goes if an earlier one that stays is its
    duplicate. Nothing goes from test because of train.

    Args:
        duplicates: of all the splits.
        source: what the data is called.
    """
    ranks = {name: _PROTECTED.index(name) for name in duplicates.splits if name in _PROTECTED}
    dropped: list[Dropped] = []
    own = {name: own_names(data) for name, data in duplicates.splits.items()}
    gone: set[int] = set()
    for image in sorted(duplicates.partners):
        split, index = duplicates.locate(image)
        partners = duplicates.partners[image]
        rank = ranks.get(split, len(_PROTECTED))
        above = [name for name in _PROTECTED[:rank] if name in partners]
        if above:
            kept = partners[above[0]][0]
        else:
            earlier = itertools.takewhile(lambda each, end=image: each < end, partners[split])
            kept = next((each for each in earlier if each not in gone), None)
            if kept is None:
                continue
        gone.add(image)
        other, place = duplicates.locate(kept)
        kind = _AS[duplicates.kind_of(kept, image)]
        why = f"{kind} {other}[{place}] {duplicates.splits[other].item_name(place)}"
        dropped.append(Dropped(split, index, own[split][index], why))
    splits = {name: (len(data), fingerprint(data)) for name, data in duplicates.splits.items()}
    return DropList(source, splits, dropped)


def fingerprint(source: Source) -> str:
    """Returns the sha256 of the names of all images in their order, without the folder they share.

    Data that was moved as a whole keeps its fingerprint.
    """
    digest = hashlib.sha256()
    for name in own_names(source):
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()


def to_text(drops: DropList) -> str:
    """Returns what the file of a list holds."""
    lines = [_TITLE, f"# source\t{_escape(drops.source)}"]
    for split, (number, names) in drops.splits.items():
        lines.append(f"# split\t{split}\t{number}\t{names}")
    lines.append("# Delete a line to keep that image; change nothing else.")
    for each in drops.dropped:
        lines.append(
            "\t".join((each.split, str(each.index), _escape(each.name), _escape(each.why)))
        )
    return "".join(f"{line}\n" for line in lines)


def write_drop_list(drops: DropList, path: Path) -> None:
    """Writes the list whole or not at all; the folder must exist."""
    atomic_write(path, to_text(drops).encode(errors="surrogateescape"))


def read_drop_list(path: str | Path) -> DropList:
    """Returns the list in a file.

    Raises:
        UserError: there is no such file, or a line of it is not as `write_drop_list` writes it.
    """
    path = Path(os.path.expanduser(path))
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        what = f"cannot read the drop list: {error.strerror}"
        raise UserError(what, where=path, fix=_FIX) from error
    lines = text.split("\n")
    if not is_format(lines[0].rstrip("\r"), _TITLE):
        raise UserError("this is not a drop list", where=path, fix=_FIX)
    source, splits, dropped = "", {}, []
    for number, line in enumerate(lines, start=1):
        cells = line.rstrip("\r").split("\t")
        try:
            if cells[0] == "# source":
                source = _unescape(cells[1])
            elif cells[0] == "# split":
                splits[cells[1]] = (int(cells[2]), cells[3])
            elif line.strip() and line[0] != "#":
                split, index, name, why = cells
                if int(index) < 0 or split not in splits:
                    raise ValueError(line)
                dropped.append(Dropped(split, int(index), _unescape(name), _unescape(why), number))
        except (ValueError, IndexError) as error:
            what = f"line {number} of the drop list is damaged: {line[:100]!r}"
            raise UserError(what, where=path, fix=_FIX) from error
    return DropList(source, splits, dropped, path)


def without(source: Source, drops: DropList, split: str) -> Source:
    """Returns the split without the images that the list names.

    Args:
        source: the whole split, as it was when the list was made.
        drops: the list.
        split: which of its splits the source is.

    Raises:
        UserError: the list was made for other data, or nothing would be left.
    """
    where = drops.path or "the drop list"
    if split not in drops.splits:
        what = f"the drop list knows no {split} split, only {', '.join(drops.splits)}"
        raise UserError(what, where=where, fix=_FIX)
    number, names = drops.splits[split]
    if number != len(source):
        what = f"the drop list was made for a {split} split of {number:,} images"
        raise UserError(f"{what}, {source.name} has {len(source):,}", where=where, fix=_FIX)
    mine = [each for each in drops.dropped if each.split == split]
    own = own_names(source)
    for each in mine:
        actual = own[each.index] if each.index < len(source) else "not there"
        if each.name != actual:
            what = f"the drop list was made for other data: its line {each.line} is {each.name!r}"
            what += f", but {split}[{each.index}] is {actual!r}"
            raise UserError(what, where=where, fix=_FIX)
    if fingerprint(source) != names:
        what = (
            f"the drop list was made for other data: images of the {split} split have other names"
        )
        raise UserError(what, where=where, fix=_FIX)
    keep = np.ones(len(source), dtype=bool)
    keep[[each.index for each in mine]] = False
    if not keep.any():
        raise UserError(f"the drop list leaves no image of the {split} split", where=where)
    return subset(source, np.flatnonzero(keep), source.name)


def _escape(text: str) -> str:
    """The text on one line and without tabs."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def _unescape(text: str) -> str:
    letters = {"t": "\t", "n": "\n", "r": "\r"}
    return re.sub(r"\\(.)", lambda found: letters.get(found[1], found[1]), text)
