"""Where images come from. A source is named SOURCE, SOURCE:SPLIT or SOURCE:SPLIT[PART]:

    digits             1,797 real 8x8 scans, which come with the package; digits@1, digits@2, ...
                       are the same images split differently
    FOLDER             FOLDER/train/<class>/*.jpg with val/ and test/ if they exist,
                       or FOLDER/<class>/*.jpg
    FILE.csv, .jsonl   a list with a path, a label and perhaps a split in every row; also .tsv, .txt
    FILE.parquet       images in the Hugging Face layout; also a pattern ("dir/x_*.parquet"), or a
                       folder that has such files, in it or in data/ below it
    FOLDER             packed data, as `mixer data pack` writes it, or indexed tars
    hf:owner/name      a data set of the Hugging Face hub; hf:owner/name@revision
    FILE.json          a subset: parts of another source, perhaps with other labels
SOURCE#label=COLUMN,image=COLUMN chooses columns, and config=NAME the configuration of a hub data
set. Splits are train, validation (or val) and test; SOURCE:train[:90%] and SOURCE:train[90%:] are
parts of one, SOURCE:test[100:200] another. Class names belong to the data: every split is matched
by name, never by position. Nothing here ever writes to the user's files.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from allmlp.data.classes import (
    UNLABELLED,
    RawLabels,
    check_twins,
    combined_names,
    make_classes,
    match_classes,
    some_of,
)
from allmlp.data.source import Source, labelled, unlabelled
from allmlp.data.source_spec import SPLITS, SourceSpec, parse_name, part_of, split_named
from allmlp.data.sources import digits, folders, hub, lists, packed, parquet, subset_file
from allmlp.data.sources.kind import Kind, Records
from allmlp.errors import UserError, near_names

# What a source can be, the first that matches; a subset file is read from another source.
KINDS = (digits.KIND, hub.KIND, packed.KIND, parquet.KIND, folders.KIND, lists.KIND)
_KNOWN = (
    "digits, a list (.csv, .tsv, .txt, .jsonl), Parquet files, packed data, hf:owner/name, or "
    + folders.LAYOUT
)
# classes: labels become classes, the same in all splits. numbers: every split has classes of its
# own, for a label rule. none: labels are not looked at. any: as classes only where the name of the
# source needs them, #label=COLUMN or a part such as [:90%].
Labels = Literal["classes", "numbers", "none", "any"]


def open_splits(
    name: str, *, labels: Labels = "classes", first_of: Sequence[str] = ()
) -> dict[str, Source]:
    """Returns the splits of a source, by the names train, validation and test.

    A source that does not say what is what has the one split train. SOURCE:SPLIT has that split
    alone, SOURCE:SPLIT[PART] its part. With `first_of` only the first of these is returned.
    """
    spec = parse_name(name)
    if labels == "any":
        is_needed = spec.part is not None or spec.path.suffix.lower() == subset_file.SUFFIX
        if "label" in spec.options or is_needed:
            # Whatever is wrong apart from the labels is reported below.
            with contextlib.suppress(*([] if "label" in spec.options else [UserError])):
                return open_splits(name, first_of=first_of)
        labels = "none"
    records = _records(spec, labels)
    if spec.split is not None and spec.split not in records:
        fix = f"Known there: {', '.join(records)}"
        raise UserError(f"the data has no {spec.split} split", where=spec.source, fix=fix)
    found = {split: _with_classes(record, spec, split, labels) for split, record in records.items()}
    splits = {split: source for split, source in found.items() if source is not None}
    if not splits:
        raise UserError("none of the images has a label", where=spec.source, fix=UNLABELLED)
    if spec.split is not None and spec.split not in splits:
        what = f"none of the images in {spec.split} has a label"
        raise UserError(what, where=spec.source, fix=UNLABELLED)
    wanted = [spec.split] if spec.split else list(first_of) or list(SPLITS)
    chosen = [split for split in wanted if split in splits][: 1 if first_of else None]
    opened: dict[str, Source] = {}
    for split in chosen:
        source, prepare = splits[split], records[split].prepare
        if prepare is not None:
            prepare()
        if labels == "classes" and "train" in splits:
            names = splits["train"].class_names
            source = match_classes(source, names, owner="train/", allow_missing=True)
        if spec.part is not None:
            source = part_of(source, spec.part, f"{spec.source}:{split}{spec.part}")
        opened[split] = source
    return opened


def open_source(
    name: str,
    *,
    labels: Labels = "classes",
    first_of: Sequence[str] = ("test", "validation", "train"),
) -> Source:
    """Returns one split: that of SOURCE:SPLIT, else the first of `first_of` that SOURCE has."""
    return next(iter(open_splits(name, labels=labels, first_of=first_of).values()))


def _with_classes(record: Records, spec: SourceSpec, split: str, labels: Labels) -> Source | None:
    """The images with the classes of their own; None if labels are needed and none has one."""
    title, images, notes = f"{spec.source}:{split}", record.images, record.notes
    if labels == "none":
        return unlabelled(images, title, notes)
    if record.labels is None:
        return None
    are_numbers = labels == "numbers"
    made = make_classes(record.labels, images.item_name, are_numbers=are_numbers)
    if made is None:
        return None
    if not are_numbers:
        check_twins(made[0], title)
    return labelled(images, title, *made, notes)


def _records(spec: SourceSpec, labels: Labels) -> Mapping[str, Records]:
    if not spec.base.strip():
        raise UserError("no data is named", fix=f"Give {_KNOWN}")
    is_subset = spec.path.is_file() and spec.path.suffix.lower() == subset_file.SUFFIX
    kind = subset_kind(labels) if is_subset else kind_of(spec)
    if kind is None:
        path, parent = spec.path.absolute(), spec.path.absolute().parent
        if path.exists():
            what = f"not a folder, and not a file of a known kind: {spec.base!r}"
            raise UserError(what, where=path, fix=f"Give {_KNOWN}")
        siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        near = near_names(path.name, siblings)
        what = f"no such data: {spec.base!r}"
        if glob.has_magic(spec.base):
            near = f"A pattern is for .parquet files. {near}"
        raise UserError(what, where=path, fix=f"{near}Give {_KNOWN}")
    for key in spec.options:
        if key not in kind.options:
            what = f"the option {key!r} has no meaning for {kind.name}"
            raise UserError(what, where=spec.source, fix=f"Leave out {key}=...")
    return kind.open(spec, labels != "none")


def kind_of(spec: SourceSpec) -> Kind | None:
    """Returns the kind of data that a name means, except a subset file."""
    return next((kind for kind in KINDS if kind.matches(spec)), None)


def subset_kind(labels: Labels) -> Kind:
    """Returns the kind of a subset file, whose images are those of another source."""

    def open_subset(spec: SourceSpec, labelled: bool) -> dict[str, Records]:
        subset = subset_file.read_subset_file(spec.path)
        wanted: Labels = "none"
        if labelled:
            wanted = "classes" if subset.labels is None else "numbers"
        else:
            subset = subset_file.SubsetFile(subset.source, subset.splits)
        found = subset_file.select(subset, open_splits(subset.source, labels=wanted), spec.source)
        return {
            split: Records(source, RawLabels(source.labels, source.class_names, True), source.notes)
            for split, source in found.items()
        }

    return Kind("a subset", lambda spec: True, open_subset)


def open_subset(subset: subset_file.SubsetFile) -> dict[str, Source]:
    """Returns the splits of a subset that is not in a file."""
    theirs = open_splits(subset.source, labels="numbers" if subset.labels else "classes")
    return {**subset_file.select(subset, theirs, subset.source)}


def notes_of(splits: Mapping[str, Source]) -> list[str]:
    """Returns what there is to say about data apart from its images, a line each."""
    notes: dict[str, None] = {}
    for source in splits.values():
        notes.update(dict.fromkeys(getattr(source, "notes", ())))
        combined = combined_names(source.class_names)
        if combined:
            why = "an image has one label here, and each of them is a class of its own"
            notes[f"classes that read like several labels: {some_of(combined, 3)} ({why})"] = None
    return list(notes)


def read_from(name: str | Path) -> Iterator[str]:
    """Yields the files and folders on this machine that a source of data is read from.

    Also for a file, folder or pattern of images. For a list that is the list, not its images.
    """
    path = os.path.expanduser(name if isinstance(name, Path) else parse_name(name).base)
    if os.path.isdir(path):
        yield path
        yield from _linked_folders(path)
    elif os.path.exists(path):
        yield path
        if path.lower().endswith(subset_file.SUFFIX):
            with contextlib.suppress(UserError):  # which is reported where the data is opened
                yield from read_from(subset_file.read_subset_file(Path(path)).source)
    else:
        yield from glob.glob(path, recursive=True)


def _linked_folders(folder: str) -> Iterator[str]:
    """The folders of splits and classes that are links to elsewhere."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir():
                if entry.is_symlink():
                    yield entry.path
                if split_named(entry.name):
                    yield from _linked_folders(entry.path)


def names_source(name: str) -> bool:
    """Whether the string names data that is not on disk: digits, digits:test, digits@1."""
    return digits.names_digits(parse_name(name))


def is_data(name: str) -> bool:
    """Whether the string names data of a known kind, and not image files to be found.

    A folder is taken for image files unless it has packed data or Parquet files, or a split is
    named.
    """
    spec = parse_name(name)
    if spec.split or spec.options:
        return True
    kind = kind_of(spec)
    if spec.path.is_dir():
        return kind is not folders.KIND
    suffixes = (*lists.SUFFIXES, ".parquet", subset_file.SUFFIX)
    return kind is not None or spec.path.suffix.lower() in suffixes
