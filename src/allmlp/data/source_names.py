"""The names of data: SOURCE#OPTION=VALUE:SPLIT[PART] -> its parts, and the part of a source.

A file or a folder that exists under the whole name is always meant, so that a colon, a "#" or a
bracket in its name does no harm.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from allmlp.data.folders import SPLIT_FOLDERS, split_named
from allmlp.data.items import Source, View, subset
from allmlp.errors import UserError, near_names

OPTIONS = ("label", "image", "config")
LABEL_COLUMNS = ("label", "labels", "class", "target")
_PART_FIX = "A part is written as SOURCE:train[:90%], SOURCE:train[90%:] or SOURCE:test[100:200]"


@dataclass(frozen=True)
class SourceName:
    """What the name of a source says.

    Attributes:
        base: the file, the folder, the pattern or the data set.
        options: what stands behind "#": the column of the labels, ...
        split: train, validation or test; None if none is named.
        part: of the split, as it was typed: "[:90%]".
    """

    base: str
    options: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    part: str | None = None

    @property
    def source(self) -> str:
        """The name without the split: SOURCE#OPTION=VALUE."""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.base}#{options}" if options else self.base

    def refuse_options(self, allowed: Sequence[str], kind: str) -> None:
        """Refuses options that mean nothing for this kind of data.

        Raises:
            UserError: names the first.
        """
        for key in self.options:
            if key not in allowed:
                what = f"the option {key!r} means nothing for {kind}"
                raise UserError(what, where=self.source, fix=f"Leave out {key}=...")


def parse_name(name: str) -> SourceName:
    """Returns what the name of a source says: of the split and the options either may come first.

    Raises:
        UserError: an option or a split is not one.
    """
    if _exists(name):
        return SourceName(name)
    rest, split, part = _take_split(name)
    base, options = _take_options(rest)
    if split is None and options:
        base, split, part = _take_split(base)
    if split is None and not _exists(base) and re.search(r"\[[\d\s.%]*:[\d\s.%]*\]$", base):
        raise UserError(f"a part of no split: {name!r}", fix=_PART_FIX)
    return SourceName(base, options, split, part)


def _take_split(name: str) -> tuple[str, str | None, str | None]:
    found = None if _exists(name) else re.fullmatch(r"(.+):([A-Za-z]+)(\[[^#]*)?", name, re.DOTALL)
    if found is None:
        return name, None, None
    base, alias, part = found.groups()
    split = split_named(alias)
    if split is None and part is not None:
        known = ", ".join(SPLIT_FOLDERS)
        raise UserError(f"no split is called {alias!r}", where=name, fix=f"Known: {known}")
    return (name, None, None) if split is None else (base, split, part)


def _take_options(name: str) -> tuple[str, dict[str, str]]:
    base, mark, text = name.rpartition("#")
    if _exists(name) or not (base and mark and ("=" in text or _exists(base))):
        return name, {}
    options: dict[str, str] = {}
    for each in text.split(","):
        key, equals, value = each.partition("=")
        if key not in OPTIONS or not equals or not value or key in options:
            near = near_names(key, OPTIONS)
            fix = f"{near}Options are written as SOURCE#label=COLUMN,image=COLUMN"
            raise UserError(f"not an option: {each!r}", where=name, fix=fix)
        options[key] = value
    return base, options


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))


def part_of(source: Source, text: str, name: str) -> View:
    """Returns a part of a source, such as "[:90%]"; [:p%] and [p%:] are disjoint and complete.

    The images count in their order. Where that is by class, as in class folders, they count
    spread over the classes instead, so that every part has its share of each class.

    Args:
        source: the whole split.
        text: "[FROM:TO]", each a number of images, a percentage (rounded down) or nothing.
        name: what to call the part on screen.

    Raises:
        UserError: it is no such text, or names images that are not there, or none.
    """
    number = r"\s*(\d+(?:\.\d+)?%|\d+)?\s*"
    found = re.fullmatch(rf"\[{number}:{number}\]", text)
    if found is None or len(text) > 50:
        raise UserError(f"not a part of a split: {text!r}", where=name, fix=_PART_FIX)
    start = _place(found[1] or "0", len(source))
    stop = _place(found[2] or "100%", len(source))
    if max(start, stop) > len(source) or start >= stop:
        many = "no" if start >= stop else "only some"
        what = f"{many} images in {text} of {len(source):,}"
        raise UserError(what, where=name, fix=_PART_FIX)
    order = _spread_over_classes(source.labels)
    indices = np.arange(start, stop) if order is None else np.sort(order[start:stop])
    return subset(source, indices, name)


def _place(text: str, length: int) -> int:
    if text.endswith("%"):
        return int(Fraction(text[:-1]) * length / 100)
    return int(text)


def _spread_over_classes(labels: np.ndarray) -> np.ndarray | None:
    """The images that lie in class order, in one where each beginning has a share of each class."""
    if len(labels) < 2 or labels[0] == labels[-1] or (np.diff(labels) < 0).any():
        return None
    _, first, counts = np.unique(labels, return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(first, counts)
    return np.lexsort((labels, (rank + 0.5) / np.repeat(counts, counts)))


def choose_column(
    role: str,
    name: SourceName,
    columns: Sequence[str],
    candidates: Sequence[str],
    preferred: Sequence[str],
    where: object,
) -> str:
    """Returns the column that an option names, else the one that it can only be.

    Args:
        role: "label" or "image", which is also the option's name.
        name: of the source, with its options.
        columns: all there are.
        candidates: those that could be it by their type or name.
        preferred: names that settle it among several.
        where: the file, for the error.

    Raises:
        UserError: there is no such column, none that could be it, or several.
    """
    given, listed = name.options.get(role), ", ".join(columns)
    if given is not None:
        if given not in columns:
            fix = f"{near_names(given, columns)}Columns: {listed}"
            raise UserError(f"no column {given!r}", where=where, fix=fix)
        return given
    for each in preferred:
        if each in candidates:
            return each
    if len(candidates) == 1:
        return candidates[0]
    base = name.base
    if candidates:
        what = f"several {role} columns: {', '.join(candidates)}"
        raise UserError(what, where=where, fix=f"Choose one: '{base}#{role}={candidates[0]}'")
    what = f"no {role} column found; columns: {listed or 'none'}"
    raise UserError(what, where=where, fix=f"Name it: '{base}#{role}=COLUMN'")
