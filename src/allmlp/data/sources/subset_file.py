"""Subset files: a small JSON file that says which images of another source make up the splits.

    {"format": "allmlp selection", "version": 1, "source": "hf:owner/name",
     "splits": {"train": ["train[:800]", "validation[:200]"], "test": ["test"]},
     "labels": {"rule": "bins", "numbers": [40, 16]}}

A split is made of parts of the source's splits, in their order. `labels` may be left out; see
`allmlp.data.label_rule`. No image is copied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allmlp.data.label_rule import LabelRule, apply_rule, rule_from_json
from allmlp.data.source import Source, join
from allmlp.data.source_spec import SPLITS, SourceSpec, parse_name, part_of
from allmlp.errors import UserError
from allmlp.io import atomic_write, read_json
from allmlp.names import NAME, is_format

SUFFIX = ".json"
FORMAT, VERSION = "allmlp selection", 1


@dataclass(frozen=True)
class SubsetFile:
    """What a subset file says.

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


def is_subset_file(spec: SourceSpec) -> bool:
    """Whether the name is that of a subset file."""
    return spec.path.suffix.lower() == SUFFIX and spec.path.is_file()


def write_subset_file(path: Path, subset: SubsetFile) -> None:
    """Writes a subset file atomically."""
    text = json.dumps(subset.to_json(), indent=2) + "\n"
    atomic_write(path, text.encode(errors="surrogateescape"))


def read_subset_file(path: Path) -> SubsetFile:
    """Returns what a subset file says."""
    values = read_json(path, "not a subset of images")
    if not isinstance(values, dict) or not is_format(values.get("format"), FORMAT):
        fix = "As data, a .json file is a subset; see docs/transfer.md. A list is .jsonl"
        raise UserError("not a subset of images", where=path, fix=fix)
    if values.get("version") != VERSION:
        what = f"written by another allmlp (version {str(values.get('version'))[:20]})"
        raise UserError(what, where=path, fix=f"pip install --upgrade {NAME}")
    rule = None if values.get("labels") is None else rule_from_json(values["labels"])
    try:
        source, splits = values["source"], values["splits"]
        base = Path(parse_name(source).base)
        is_valid = splits.keys() <= SPLITS.keys() and all(splits.values())
        if not (splits and is_valid and all(type(parts) is list for parts in splits.values())):
            raise ValueError(splits)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = "the subset has no source, or its splits are not lists of parts"
        fix = '"source": "NAME", "splits": {"train": ["train[:800]"], "test": ["test"]}'
        raise UserError(what, where=path, fix=fix) from error
    if base.suffix.lower() == SUFFIX:
        what = f"a subset of a subset: {source!r}"
        raise UserError(what, where=path, fix="Name the source itself")
    return SubsetFile(source, {split: tuple(parts) for split, parts in splits.items()}, rule)


def select(subset: SubsetFile, theirs: Mapping[str, Source], name: str) -> dict[str, Source]:
    """Returns the splits of a subset; `theirs` are those of its source."""
    if subset.labels is not None:
        theirs = {split: apply_rule(theirs[split], subset.labels) for split in theirs}
    found: dict[str, Source] = {}
    for split in (split for split in SPLITS if split in subset.splits):
        parts = [_part(theirs, text, subset.source) for text in subset.splits[split]]
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
    """Returns ("train", "[:800]") for "train[:800]", and ("test", "") for "test"."""
    found = re.fullmatch(rf"({'|'.join(SPLITS)})(\[.*\])?", str(text))
    if found is None:
        fix = "train, validation or test, or a part: train[:800]"
        raise UserError(f"not a part of a source: {str(text)[:80]!r}", fix=fix)
    return found[1], found[2] or ""
