"""Data names, SOURCE#OPTION=VALUE:SPLIT[PART].

A file or folder of that name takes precedence, so that it may contain a colon, "#" or brackets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from allmlp.data.classes import natural_order
from allmlp.data.source import Source, subset
from allmlp.errors import UserError, near_names

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
OPTIONS = ("label", "labels", "separator", "image", "group", "config")
LABEL_OPTIONS = ("label", "labels", "separator")
_PART_FIX = "A part is written as SOURCE:train[:90%], SOURCE:train[90%:] or SOURCE:test[100:200]"


@dataclass(frozen=True)
class SourceSpec:
    base: str  # file, folder, pattern or data set
    options: Mapping[str, str] = field(default_factory=dict)  # after "#": label column, ...
    split: str | None = None  # train, validation or test; None if not given
    part: str | None = None  # part of the split as typed: "[:90%]"

    @property
    def source(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.base}#{options}" if options else self.base

    @property
    def path(self) -> Path:
        return Path(os.path.expanduser(self.base))


def parse_name(name: str) -> SourceSpec:
    base, options, split, part = name, {}, None, None
    for _ in range(2):
        if split is None:
            base, split, part = _take_split(base)
        if not options:
            base, options = _take_options(base)
    if split is None and not _exists(base) and re.search(r"\[[\d\s.%]*:[\d\s.%]*\]$", base):
        raise UserError(f"a part needs a split: {name!r}", fix=_PART_FIX)
    return SourceSpec(base, options, split, part)


def _take_split(name: str) -> tuple[str, str | None, str | None]:
    found = None if _exists(name) else re.fullmatch(r"(.+):([A-Za-z]+)(\[[^#]*)?", name, re.DOTALL)
    if found is None:
        return name, None, None
    base, alias, part = found.groups()
    split = split_named(alias)
    if split is None and part is not None:
        raise UserError(f"unknown split {alias!r}", where=name, fix=f"Known: {', '.join(SPLITS)}")
    return (name, None, None) if split is None else (base, split, part)


def _take_options(name: str) -> tuple[str, dict[str, str]]:
    base, mark, text = name.rpartition("#")
    if _exists(name) or not (base and mark and ("=" in text or _exists(base))):
        return name, {}
    options: dict[str, str] = {}
    for option in text.split(","):
        key, _, value = option.partition("=")
        if key not in OPTIONS or not value or key in options:
            near = near_names(key, OPTIONS)
            fix = f"{near}Options are written as SOURCE#label=COLUMN,group=COLUMN"
            raise UserError(f"not an option: {option!r}", where=name, fix=fix)
        options[key] = value
    return base, options


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))


def split_named(name: str) -> str | None:
    """Returns the split for a name such as "Val" or "val_set" -> "validation"; None for others."""
    word = re.sub(r"[-_. ]?(dataset|sets?|data|images|imgs)$", "", name.casefold())
    return next((split for split, names in SPLITS.items() if word in names), None)


def by_split(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Returns files by the split in their names ("x_test.parquet") or in those of their folders."""
    found: dict[str, list[str]] = {}
    ordered = sorted(paths, key=lambda path: natural_order(str(path)))
    in_folders = len({path.parent for path in ordered}) > 1
    for path in ordered:
        parts = re.split(r"[-_.:]", path.name.casefold())
        words = [split for split, names in SPLITS.items() if not set(names).isdisjoint(parts)]
        if len(words) > 1:
            what = f"the file's name has words for several splits: {path.name}"
            fix = "Rename the file, for example to NAME-train.parquet"
            raise UserError(what, where=path, fix=fix)
        of_folder = split_named(path.parent.name) if in_folders else None
        split = words[0] if words else of_folder or "train"
        found.setdefault(split, []).append(str(path))
    return {split: found[split] for split in SPLITS if split in found}


def part_of(source: Source, text: str, name: str) -> Source:
    """Returns a part of a split, "[:90%]"; images sorted by class are interleaved first."""
    number = r"\s*(\d+(?:\.\d+)?%|\d+)?\s*"
    found = re.fullmatch(rf"\[{number}:{number}\]", text)
    if found is None or len(text) > 50:
        raise UserError(f"not a part of a split: {text!r}", where=name, fix=_PART_FIX)
    start, stop = (
        int(Fraction(end[:-1]) * len(source) / 100) if end.endswith("%") else int(end)
        for end in (found[1] or "0", found[2] or "100%")
    )
    if not start < stop <= len(source):
        many = "no" if start >= stop else "only some"
        raise UserError(f"{many} images in {text} of {len(source):,}", where=name, fix=_PART_FIX)
    order, labels = np.arange(len(source)), source.labels
    if not source.is_multi_label and labels[0] != labels[-1] and (np.diff(labels) >= 0).all():
        _, first, counts = np.unique(labels, return_index=True, return_counts=True)
        rank = order - np.repeat(first, counts)
        order = np.lexsort((labels, (rank + 0.5) / np.repeat(counts, counts)))
    return subset(source, np.sort(order[start:stop]), name)
