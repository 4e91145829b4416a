"""Opening data by name: SOURCE, SOURCE:SPLIT or SOURCE:SPLIT[PART], see docs/data.md.

Classes are built here for all kinds of sources, and matched by name, never by position.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from allmlp.data.classes import (
    UNLABELLED,
    RawLabels,
    check_twins,
    make_classes,
    match_classes,
    split_labels,
)
from allmlp.data.source import Source, as_multi_label
from allmlp.data.source_spec import (
    LABEL_OPTIONS,
    SPLITS,
    SourceSpec,
    parse_name,
    part_of,
    split_named,
)
from allmlp.data.sources import arrays, digits, folders, hub, lists, packed, parquet, webdataset
from allmlp.data.sources.columns import Kind, Rows, divide
from allmlp.data.sources.subset_file import SubsetFile, is_subset_file, read_subset_file, select
from allmlp.errors import UserError, near_names, one_of

_KNOWN = (
    "digits, a list (.csv, .tsv, .txt, .jsonl), Parquet files, arrays (.npy, .npz), packed data, "
    "hf:owner/name, or " + folders.LAYOUT
)
# classes: labels become classes, the same in all splits. numbers: classes per split, for a label
# rule. none: labels are ignored. any: like classes, but only if the source name needs labels
# (#label=COLUMN or a part such as [:90%]).
Labels = Literal["classes", "numbers", "none", "any"]


def open_splits(
    name: str, *, labels: Labels = "classes", first_of: Sequence[str] = ()
) -> dict[str, Source]:
    """Returns the splits by name; SOURCE:SPLIT or the first of `first_of` gives that only."""
    spec = parse_name(name)
    if labels == "any":
        labels = "none"
        if not spec.options.keys().isdisjoint(LABEL_OPTIONS):
            labels = "classes"
        elif spec.part is not None or is_subset_file(spec):
            with contextlib.suppress(UserError):  # other errors are reported below
                return open_splits(name, first_of=first_of)
    found: dict[str, Source] = {}
    raws: dict[str, RawLabels] = {}
    prepare: dict[str, Callable[[], object]] = {}
    for rows in _rows(spec, labels != "none"):
        for split, source, raw in divide(spec, rows, labels != "none"):
            found[split], prepare[split] = source, rows.prepare
            if raw is not None:
                raws[split] = raw
    if spec.split is not None:
        one_of("split", spec.split, found, where=spec.source)
    raws, note = split_labels(raws, spec.options, spec.base)
    splits: dict[str, Source] = {}
    for split, source in found.items():
        title, notes = f"{spec.source}:{split}", (*source.notes, *filter(None, [note]))
        source = replace(source, name=title, notes=notes)
        if labels == "none":
            splits[split] = source
        elif split in raws:
            made = make_classes(raws[split], are_numbers=labels == "numbers")
            if made is not None:
                source = replace(source, class_names=made[0], labels=made[1])
                splits[split] = as_multi_label(source) if note else source
                if labels != "numbers":
                    check_twins(made[0], title)
    wanted = [spec.split] if spec.split else list(first_of) or list(SPLITS)
    chosen = [split for split in wanted if split in splits][: 1 if first_of else None]
    if not splits or (spec.split and not chosen):
        where = f" in {spec.split}" if spec.split else ""
        raise UserError(f"none of the images{where} has a label", where=spec.source, fix=UNLABELLED)
    for split in chosen:
        source = splits[split]
        prepare[split]()
        if labels == "classes" and "train" in splits:
            names = splits["train"].class_names
            source = match_classes(source, names, owner="train/", allow_missing=True)
        if spec.part is not None:
            source = part_of(source, spec.part, f"{spec.source}:{split}{spec.part}")
        splits[split] = source
    return {split: splits[split] for split in chosen}


def open_source(
    name: str,
    *,
    labels: Labels = "classes",
    first_of: Sequence[str] = ("test", "validation", "train"),
) -> Source:
    """Returns one split: the one named by SOURCE:SPLIT, else the first of `first_of` in SOURCE."""
    return next(iter(open_splits(name, labels=labels, first_of=first_of).values()))


def open_subset(subset: SubsetFile, name: str | None = None) -> dict[str, Source]:
    labels = "classes" if subset.labels is None else "numbers"
    return select(subset, open_splits(subset.source, labels=labels), name or subset.source)


def _rows(spec: SourceSpec, labels: bool) -> Iterable[Rows]:
    if not spec.base.strip():
        raise UserError("no data is named", fix=f"Give {_KNOWN}")
    kind, path = kind_of(spec), spec.path.absolute()
    if kind is None:
        before, colon, word = spec.base.rpartition(":")
        if colon and spec.split is None and kind_of(parse_name(before)) is not None:
            one_of("split", word, SPLITS, where=before)
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "not data of a known kind" if path.exists() else "no such data"
        fix = f"{near_names(path.name, beside)}Give {_KNOWN}"
        raise UserError(f"{what}: {spec.base!r}", where=path, fix=fix)
    for key in spec.options:
        if key not in kind.options:
            what = f"the option {key!r} has no meaning for {kind.name}"
            raise UserError(what, where=spec.source, fix=f"Leave out {key}=...")
    return kind.open(spec, labels)


def _open_subset_file(spec: SourceSpec, labels: bool) -> Iterator[Rows]:
    subset = read_subset_file(spec.path)
    if labels:
        found = open_subset(subset, spec.source)
    else:
        theirs = open_splits(subset.source, labels="none")
        found = select(replace(subset, labels=None), theirs, spec.source)
    for split, source in found.items():
        raw = RawLabels(source.labels, source.class_names, are_classes=True)
        yield Rows(source, {"label": lambda raw=raw: raw}, split, notes=source.notes)


# The first match wins.
KINDS = (
    *(digits.KIND, hub.KIND, packed.KIND, arrays.KIND, parquet.KIND, webdataset.KIND),
    *(folders.KIND, lists.KIND, Kind("a subset", is_subset_file, _open_subset_file)),
)


def kind_of(spec: SourceSpec) -> Kind | None:
    return next((kind for kind in KINDS if kind.matches(spec)), None)


def notes_of(splits: Mapping[str, Source]) -> list[str]:
    return list(dict.fromkeys(note for source in splits.values() for note in source.notes))


def read_from(name: str | Path) -> Iterator[str]:
    """Yields the files and folders that a source is read from; of a list the list itself."""
    path = os.path.expanduser(name if isinstance(name, Path) else parse_name(name).base)
    if not os.path.exists(path):
        yield from glob.glob(path, recursive=True)
        return
    yield path
    if os.path.isdir(path):  # split and class folders may be links
        for folder in glob.glob(f"{glob.escape(path)}/*/"):
            yield folder
            if split_named(os.path.basename(folder[:-1])):
                yield from glob.glob(f"{glob.escape(folder)}*/")
    elif is_subset_file(SourceSpec(path)):
        with contextlib.suppress(UserError):  # reported when the data is opened
            yield from read_from(read_subset_file(Path(path)).source)


def names_source(name: str) -> bool:
    return digits.names_digits(parse_name(name))


def are_arrays(name: str) -> bool:
    return kind_of(parse_name(name)) is arrays.KIND


def is_data(name: str) -> bool:
    """Whether the string names data rather than image files or a folder to search for them."""
    spec = parse_name(name)
    if spec.split or spec.options:
        return True
    kind = kind_of(spec)
    if kind is folders.KIND:
        return False
    suffixes = (*lists.SUFFIXES, *arrays.SUFFIXES, ".parquet", ".json")
    return kind is not None or spec.path.suffix.lower() in suffixes
