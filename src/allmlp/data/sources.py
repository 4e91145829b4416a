"""Where images come from: (encoded bytes, label) by index, with the class names.

A source is named by a string, SOURCE or SOURCE:SPLIT or SOURCE:SPLIT[PART]:
    digits             the scikit-learn digits: 1,797 real 8x8 scans, installed with a dependency;
                       digits@1, digits@2, ... are the same images split otherwise
    FOLDER             FOLDER/train/<class>/*.jpg with val/ and test/ where they exist,
                       or FOLDER/<class>/*.jpg
    FILE.csv, .jsonl   a list with a path, a label and perhaps a split in every row; also .tsv, .txt
    FILE.parquet       images in the Hugging Face layout; also a pattern ("dir/x_*.parquet"), or a
                       folder that has such files, in it or in data/ below it
    FOLDER             tar shards with an index, as `mixer data pack` writes them
    hf:owner/name      a data set of the Hugging Face hub; hf:owner/name@revision
    FILE.json          a selection: parts of another source, perhaps under other labels
SOURCE#label=COLUMN,image=COLUMN chooses columns, and config=NAME the configuration of a hub data
set. Splits are train, validation (or val) and test; SOURCE:train[:90%] and SOURCE:train[90%:] are
parts of one, SOURCE:test[100:200] another. Class names belong to the data: every split is matched
by name, never by position. Nothing here ever writes to the user's files.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from allmlp.data import hub_dataset, lists, selections
from allmlp.data.classes import combined_names, match_classes, refuse_twins, some_of
from allmlp.data.digits import digits
from allmlp.data.folders import (
    LAYOUT,
    SPLIT_FOLDERS,
    class_folder,
    find_splits,
    flat_folder,
    refuse_other_folders,
    split_named,
    subfolders,
)
from allmlp.data.items import ImageFiles, Source, View, without_labels
from allmlp.data.parquet import open_parquet
from allmlp.data.parquet_images import ParquetImages
from allmlp.data.shards import has_shards, open_shards, refuse_unfinished
from allmlp.data.source_names import SourceName, parse_name, part_of
from allmlp.errors import UserError, near_names

_KINDS = (
    f"digits, a list (.csv, .tsv, .txt, .jsonl), Parquet files, shards, hf:owner/name, or {LAYOUT}"
)


def open_splits(name: str) -> dict[str, Source]:
    """Returns the splits that a source has, by the names train, validation and test.

    A source that does not say what is what has the one split train. Of SOURCE:SPLIT it is that
    split alone, and of SOURCE:SPLIT[PART] its part.

    Args:
        name: as the module describes.

    Raises:
        UserError: there is no such source, or a split is not as it should be.
    """
    parsed = parse_name(name)
    return _open(parsed, [parsed.split] if parsed.split else list(SPLIT_FOLDERS))


def open_unmatched(name: str) -> dict[str, Source]:
    """Returns the splits as `open_splits`, but each with the classes of its own.

    That is for labels that are numbers, which a label rule puts into classes: a distance need not
    occur in every split.

    Raises:
        UserError: as `open_splits`.
    """
    parsed = parse_name(name)
    wanted = [parsed.split] if parsed.split else list(SPLIT_FOLDERS)
    return _open(parsed, wanted, matched=False)


def open_source(name: str) -> Source:
    """Returns one split: that of SOURCE:SPLIT, else of SOURCE the test, validation or train split.

    Raises:
        UserError: there is no such source or no such split.
    """
    parsed = parse_name(name)
    wanted = [parsed.split] if parsed.split else ["test", "validation", "train"]
    return next(iter(_open(parsed, wanted, first=True).values()))


def open_images(name: str, order: Sequence[str] = ("test", "validation", "train")) -> Source:
    """Returns one split of data whose labels nobody needs: the same images, labelled or not.

    Labels are looked at only where they are asked for by SOURCE#label=COLUMN, and where there are
    parts such as test[:90%]: of labelled data these are the same as everywhere else. Images without
    labels are all of one class, "unknown".

    Args:
        name: as the module describes; a folder may also have its images directly in it.
        order: of a name without a split, the first of these that there is.

    Raises:
        UserError: there is no such source or no such split.
    """
    parsed = parse_name(name)
    wanted = [parsed.split] if parsed.split else list(order)
    if "label" in parsed.options:
        return next(iter(_open(parsed, wanted, first=True).values()))
    if parsed.part is not None or Path(parsed.base).suffix.lower() == selections.SUFFIX:
        with contextlib.suppress(UserError):  # whatever is wrong but the labels is told below
            return next(iter(_open(parsed, wanted, first=True).values()))
    return next(iter(_open(parsed, wanted, first=True, labels=False).values()))


def notes_of(splits: Mapping[str, Source]) -> list[str]:
    """Returns what there is to say of data beside its images, a line each."""
    notes: dict[str, None] = {}
    for source in splits.values():
        while isinstance(source, View):
            source = source.source
        notes.update(dict.fromkeys(source.notes if isinstance(source, ImageFiles) else ()))
        combined = combined_names(source.class_names)
        if combined:
            said = "an image has one label here, and each of them is a class of its own"
            notes[f"classes that read like several labels: {some_of(combined, 3)} ({said})"] = None
    return list(notes)


def read_from(name: str | Path) -> Iterator[str]:
    """Yields the files and folders on this machine that a source of data is read from.

    The same of a file, folder or pattern of images. Of a list that is the list, not its images.
    """
    path = os.path.expanduser(name if isinstance(name, Path) else parse_name(name).base)
    if os.path.isdir(path):
        yield path
        yield from _linked_folders(path)
    elif os.path.exists(path):
        yield path
        if path.lower().endswith(selections.SUFFIX):
            with contextlib.suppress(UserError):  # which is told where the data is opened
                yield from read_from(selections.read_selection(Path(path)).source)
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
    """Returns whether the string names data that is not on disk: digits, digits:test, digits@1."""
    return re.split("[:@]", name)[0] == "digits" and not Path(name).exists()


def is_data(name: str) -> bool:
    """Returns whether the string names data of a known kind, and not image files to be found.

    A folder is taken for image files unless it holds shards or Parquet files, or a split is named.
    """
    parsed, path = parse_name(name), Path(os.path.expanduser(name))
    if parsed.split or parsed.options or names_source(name):
        return True
    if path.is_dir():
        return has_shards(path) or bool(_parquet_files(path))
    is_file_of_images = path.suffix.lower() in (*lists.SUFFIXES, ".parquet", selections.SUFFIX)
    return is_file_of_images or (name.startswith(hub_dataset.PREFIX) and not path.exists())


def _open(
    name: SourceName,
    wanted: list[str],
    first: bool = False,
    *,
    matched: bool = True,
    labels: bool = True,
) -> dict[str, Source]:
    """The splits that are wanted, or only the first of them, of those that the source has."""
    found = _open_all(name, matched and labels, labels)
    if name.split is not None and name.split not in found:
        fix = f"Known there: {', '.join(found)}"
        raise UserError(f"the data has no {name.split} split", where=name.source, fix=fix)
    chosen = [split for split in wanted if split in found][: 1 if first else None]
    for source in found.values() if labels and matched else ():  # else numbers for a rule
        refuse_twins(source.class_names, source.name)
    opened: dict[str, Source] = {}
    for split in chosen:
        source = found[split]
        if isinstance(source, ParquetImages):
            source.hold()
        if matched and labels and "train" in found:
            names = found["train"].class_names
            source = match_classes(source, names, owner="train/", allow_missing=True)
        if name.part is not None:
            source = part_of(source, name.part, f"{name.source}:{split}{name.part}")
        opened[split] = source
    return opened


def _open_all(name: SourceName, matched: bool, labels: bool) -> Mapping[str, Source]:
    """The splits of a source, each with its own classes; without labels where none are needed."""
    if not name.base.strip():
        raise UserError("no data is named", fix=f"Give {_KINDS}")
    path = Path(os.path.expanduser(name.base))
    if names_source(name.base):
        name.refuse_options((), "digits")
        return digits(_split_seed(name.base))
    if name.base.startswith(hub_dataset.PREFIX) and not path.exists():
        return hub_dataset.open_hub(name, labels=labels)
    if path.is_dir():
        return _open_folder(path, name, labels)
    if path.exists():
        if path.suffix.lower() in lists.SUFFIXES:
            return lists.open_list(name, matched=matched, labels=labels)
        if path.suffix.lower() == selections.SUFFIX:
            if not labels:
                return selections.open_unlabelled(name, _open_unlabelled)
            return selections.open_selection(name, open_splits, open_unmatched)
        if path.suffix.lower() == ".parquet":
            return open_parquet([path], name, labels=labels)
        what = f"not a folder, and not a file of a known kind: {name.base!r}"
        raise UserError(what, where=path, fix=f"Give {_KINDS}")
    if glob.has_magic(name.base):
        files = [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]
        if files and all(each.suffix.lower() == ".parquet" for each in files):
            return open_parquet(files, name, labels=labels)
        other = next((each for each in files if each.suffix.lower() != ".parquet"), None)
        what = f"the pattern {name.base!r} matches " + (f"{other}" if other else "no file")
        raise UserError(what, where=path.absolute(), fix="A pattern is for .parquet files")
    parent = path.absolute().parent
    siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    fix = f"{near_names(path.name, siblings)}Give {_KINDS}"
    raise UserError(f"no such data: {name.base!r}", where=path.absolute(), fix=fix)


def _open_unlabelled(name: str) -> dict[str, Source]:
    found = _open(parse_name(name), list(SPLIT_FOLDERS), labels=False)
    return {split: without_labels(source) for split, source in found.items()}


def _open_folder(path: Path, name: SourceName, labels: bool) -> Mapping[str, Source]:
    refuse_unfinished(path)
    if has_shards(path):
        name.refuse_options((), "shards")
        return open_shards(path, name.source, labels=labels)
    files = _parquet_files(path)
    if files:
        return open_parquet(files, name, labels=labels)
    name.refuse_options((), "class folders")
    if any(path.glob("*.tar")) and not subfolders(path):
        what = "the folder has tar files and no index of them"
        raise UserError(what, where=path, fix=f"Write one, once: mixer data index {path}")
    if not labels and not subfolders(path):
        return {"train": flat_folder(path, name.source)}
    splits, unused = find_splits(path)
    notes: tuple[str, ...] = ()
    if labels:
        for folder in splits.values():
            refuse_other_folders(folder)
        if unused:
            notes = (f"not used: {', '.join(unused)} (not splits with class folders)",)
    return {
        split: class_folder(folder, f"{name.source}:{split}", notes)
        for split, folder in splits.items()
    }


def _parquet_files(path: Path) -> list[Path]:
    files = [*path.glob("*.parquet")] or [*path.glob("data/*.parquet")]
    return [each for each in files if each.name[0] != "."]


def _split_seed(name: str) -> int:
    _, _, seed = name.partition("@")
    if not (name == "digits" or seed.isdecimal()):
        raise UserError(f"unknown data {name!r}", fix="digits, or digits@1 for another split")
    return int(seed or 0)
