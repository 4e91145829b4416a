"""Selections: a small JSON file that says which images of another source make up the splits.

    {"format": "allmlp selection", "version": 1, "source": "hf:owner/name",
     "splits": {"train": ["train[:800]", "validation[:200]"], "test": ["test"]},
     "labels": {"rule": "bins", "numbers": [40, 16]}}

A split is made of parts of the source's splits, in their order. `labels` may be left out; see
`allmlp.data.label_rules`. No image is copied.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from allmlp.data.folders import SPLIT_FOLDERS
from allmlp.data.items import Source
from allmlp.data.label_rules import LabelRule, apply_rule, rule_from_json
from allmlp.data.source_names import SourceName, parse_name, part_of
from allmlp.errors import UserError
from allmlp.io import atomic_write, parse_json
from allmlp.names import NAME, is_format

SUFFIX = ".json"
FORMAT, VERSION = "allmlp selection", 1
Opened = Mapping[str, Source]


@dataclass(frozen=True)
class Selection:
    """What a selection file says.

    Args:
        source: the source's name; a relative path is relative to the working directory.
        splits: split -> its parts, such as "train[:800]" or "test".
        labels: what makes classes of its labels; None keeps its classes.
    """

    source: str
    splits: dict[str, tuple[str, ...]]
    labels: LabelRule | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        values: dict[str, Any] = {"format": FORMAT, "version": VERSION, "source": self.source}
        values["splits"] = {name: list(parts) for name, parts in self.splits.items()}
        if self.labels is not None:
            values["labels"] = {"rule": self.labels.rule, "numbers": list(self.labels.numbers)}
        return values


@dataclass(frozen=True)
class Joined:
    """Several sources with the same classes, one behind the other."""

    name: str
    class_names: list[str]
    labels: np.ndarray
    parts: tuple[Source, ...]
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def _at(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], index - (int(self.ends[part - 1]) if part else 0)

    def read(self, index: int) -> bytes:
        part, at = self._at(index)
        return part.read(at)

    def item_name(self, index: int) -> str:
        part, at = self._at(index)
        return part.item_name(at)


def join(parts: Sequence[Source], name: str) -> Source:
    """Returns sources with the same classes as one.

    Args:
        parts: at least one, each with images.
        name: what to call it on screen.
    """
    names = parts[0].class_names
    assert all(each.class_names == names for each in parts)
    labels = np.concatenate([each.labels for each in parts])
    ends = np.cumsum([len(each) for each in parts])
    return Joined(name, names, labels, tuple(parts), ends)


def write_selection(path: Path, selection: Selection) -> None:
    """Writes a selection file whole or not at all."""
    text = json.dumps(selection.to_json(), indent=2) + "\n"
    atomic_write(path, text.encode(errors="surrogateescape"))


def read_selection(path: Path) -> Selection:
    """Returns what a selection file says.

    Raises:
        UserError: it is none.
    """
    try:
        values = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=path) from error
    except ValueError as error:
        raise UserError(f"not a selection of images: {str(error)[:200]}", where=path) from error
    if not isinstance(values, dict) or not is_format(values.get("format"), FORMAT):
        fix = "As data, a .json file is a selection; see docs/transfer.md. A list is .jsonl"
        raise UserError("not a selection of images", where=path, fix=fix)
    if values.get("version") != VERSION:
        what = f"written by another allmlp (version {str(values.get('version'))[:20]})"
        raise UserError(what, where=path, fix=f"pip install --upgrade {NAME}")
    source, splits = values.get("source"), values.get("splits")
    rule = None if values.get("labels") is None else rule_from_json(values["labels"])
    if not isinstance(source, str) or not _are_splits(splits):
        what = "the selection has no source, or its splits are not lists of parts"
        fix = '"source": "NAME", "splits": {"train": ["train[:800]"], "test": ["test"]}'
        raise UserError(what, where=path, fix=fix)
    return Selection(source, {name: tuple(each) for name, each in splits.items()}, rule)


def _are_splits(splits: Any) -> TypeGuard[dict[str, list[str]]]:
    return (
        isinstance(splits, dict)
        and bool(splits)
        and all(
            name in SPLIT_FOLDERS
            and isinstance(parts, list)
            and bool(parts)
            and all(isinstance(each, str) for each in parts)
            for name, parts in splits.items()
        )
    )


def open_selection(
    name: SourceName,
    open_splits: Callable[[str], Opened],
    open_unmatched: Callable[[str], Opened],
) -> dict[str, Source]:
    """Returns the splits of a selection.

    Args:
        name: of its file.
        open_splits: opens the source that it selects from.
        open_unmatched: opens it with the classes that each split has of its own, which a label rule
            then makes one.

    Raises:
        UserError: it is no selection, or the source lacks what it selects.
    """
    name.refuse_options((), "a selection")
    selection = _read_named(name)
    return select(selection, (open_unmatched if selection.labels else open_splits), name.source)


def open_unlabelled(name: SourceName, opener: Callable[[str], Opened]) -> dict[str, Source]:
    """Returns the splits of a selection whose labels nobody needs; as `open_selection`.

    Args:
        name: of its file.
        opener: opens the source that it selects from, without labels.

    Raises:
        UserError: as `open_selection`.
    """
    name.refuse_options((), "a selection")
    selection = dataclasses.replace(_read_named(name), labels=None)
    return select(selection, opener, name.source)


def _read_named(name: SourceName) -> Selection:
    path = Path(name.base).expanduser()
    selection = read_selection(path)
    if Path(parse_name(selection.source).base).suffix.lower() == SUFFIX:
        what = f"a selection of a selection: {selection.source!r}"
        raise UserError(what, where=path, fix="Name the source itself")
    return selection


def select(selection: Selection, opener: Callable[[str], Opened], name: str) -> dict[str, Source]:
    """Returns the splits of a selection from the source that `opener` opens; see the module.

    Raises:
        UserError: the source lacks what it selects.
    """
    theirs = dict(opener(selection.source))
    if selection.labels is not None:
        theirs = {each: apply_rule(theirs[each], selection.labels) for each in theirs}
    found: dict[str, Source] = {}
    for split in (each for each in SPLIT_FOLDERS if each in selection.splits):
        parts = [_part(theirs, text, selection.source) for text in selection.splits[split]]
        found[split] = join(parts, f"{name}:{split}")
    return found


def _part(theirs: Mapping[str, Source], text: str, source: str) -> Source:
    split, part = split_and_part(text)
    if split not in theirs:
        fix = f"Known there: {', '.join(theirs)}"
        raise UserError(f"the data has no {split} split", where=source, fix=fix)
    whole = theirs[split]
    return part_of(whole, part, f"{source}:{text}") if part else whole


def split_and_part(text: str) -> tuple[str, str]:
    """Returns ("train", "[:800]") of "train[:800]", and ("test", "") of "test".

    Raises:
        UserError: it is neither.
    """
    found = re.fullmatch(rf"({'|'.join(SPLIT_FOLDERS)})(\[.*\])?", text)
    if found is None:
        fix = "train, validation or test, or a part: train[:800]"
        raise UserError(f"not a part of a source: {text[:80]!r}", fix=fix)
    return found[1], found[2] or ""
