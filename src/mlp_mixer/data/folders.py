"""Folders of images: which files count, class folders, and which folder or file is which split.

Nothing here ever writes to the user's files.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlp_mixer.data.classes import natural_order, refuse_twins
from mlp_mixer.data.image import SUFFIXES
from mlp_mixer.data.items import ImageFiles, PackedStrings, no_labels
from mlp_mixer.errors import UserError

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
LAYOUT = "class folders: FOLDER/train/<class>/*.jpg (val/ and test/ if you have them)"


def split_named(name: str) -> str | None:
    """Returns the split that a name means: "Val" -> "validation"; None if it means none."""
    return next((s for s, names in SPLIT_FOLDERS.items() if name.casefold() in names), None)


def split_of_file(path: Path) -> str:
    """Returns the split that a file's name has a word for: "x_test.parquet" -> "test"; else train.

    Raises:
        UserError: the name has words for two splits.
    """
    found = map(split_named, re.split(r"[-_.:]", path.name))
    words = {split for split in found if split is not None}
    if len(words) > 1:
        what = f"the file's name has words for several splits: {path.name}"
        raise UserError(what, where=path, fix="Rename the file, such as to NAME-train.parquet")
    return words.pop() if words else "train"


def image_files(folder: Path) -> list[Path]:
    """Returns the image files in the folder at any depth, by their endings, sorted; none hidden."""
    return [folder / name for name in scan_images(str(folder))]


def scan_images(folder: str, inside: str = "") -> Iterator[str]:
    """Yields the image files in the folder at any depth, as paths relative to it.

    Sorted, folder by folder. Hidden files and folders are passed over; a link to a file is one, a
    link to a folder deep inside is not followed, so that no circle of links is walked forever.

    Raises:
        UserError: a folder cannot be read.
    """
    for entry in _entries(os.path.join(folder, inside)):
        if entry.name[0] == ".":
            continue
        path = os.path.join(inside, entry.name)
        if _is_folder(entry):
            if not entry.is_symlink():
                yield from scan_images(folder, path)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file that cannot be read
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    is_named_so = os.path.splitext(entry.name)[1].lower() in SUFFIXES
    return entry.name[0] != "." and is_named_so and not _is_folder(entry)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder: {error.strerror}", where=folder) from error


def subfolders(folder: Path) -> list[str]:
    """Returns the names of the folders directly in a folder, in natural order; none hidden."""
    entries = _entries(str(folder))
    names = [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()]
    return sorted(names, key=natural_order)


def class_folder(folder: Path, name: str) -> ImageFiles:
    """Returns the images of FOLDER/<class>/, at any depth below the class, as a source.

    Raises:
        UserError: there are no class folders, a class is empty, or two differ in case only.
    """
    classes = subfolders(folder)
    if not classes:
        raise UserError("no class folders found", where=folder, fix=f"Arrange it as {LAYOUT}")
    refuse_twins(classes, folder)
    counts = array("q")

    def paths() -> Iterator[str]:
        for each in classes:
            counts.append(0)
            for path in scan_images(str(folder / each)):
                counts[-1] += 1
                yield os.path.join(each, path)
            if counts[-1] == 0:
                raise UserError(
                    f"class {each!r} has no images",
                    where=folder / each,
                    fix=f"Put images there ({' '.join(SUFFIXES)}) or remove the folder",
                )

    packed = PackedStrings(paths())
    labels = np.repeat(np.arange(len(classes)), counts)
    return ImageFiles(name, classes, labels, packed, str(folder))


def flat_folder(folder: Path, name: str) -> ImageFiles:
    """Returns the images in a folder at any depth as a source without labels.

    Raises:
        UserError: there are none.
    """
    paths = PackedStrings(scan_images(str(folder)))
    if not len(paths):
        fix = f"Images end in {' '.join(SUFFIXES)}"
        raise UserError("the folder has no images", where=folder, fix=fix)
    return ImageFiles(name, *no_labels(len(paths)), paths, str(folder))


def find_splits(folder: Path) -> dict[str, Path]:
    """Returns the folder of each split, train first; a folder of classes is its own train split.

    A folder that is named like a split but has no folders in it is a class of that name.

    Raises:
        UserError: it cannot be told which split a folder is.
    """
    inside = {entry: subfolders(folder / entry) for entry in subfolders(folder)}
    splits: dict[str, Path] = {}
    for entry, classes in inside.items():
        split = split_named(entry)
        if split is None or not classes:
            continue
        if split in splits:
            what = f"two folders for one split: {splits[split].name} and {entry}"
            raise UserError(what, where=folder, fix="Merge them or rename one")
        splits[split] = folder / entry
    if not splits:
        return {"train": folder}
    for path in splits.values():
        loose = next((each.name for each in _entries(str(path)) if _is_image(each)), None)
        if loose is not None:
            what = f"the folder {path.name!r} has both folders and images, such as {loose!r}"
            fix = "Put the images into class folders; a class needs another name than a split"
            raise UserError(what, where=path, fix=fix)
    known = {each for path in splits.values() for each in inside[path.name]}
    for entry, classes in inside.items():
        if folder / entry not in splits.values() and known & set(classes):
            what = f"the folder {entry!r} has the same classes, but its name is no split's"
            raise UserError(what, where=folder / entry, fix="Name it val or test, or move it away")
    return {split: splits[split] for split in SPLIT_FOLDERS if split in splits}
