"""Folders of images: which files count, class folders, and which folder is which split.

Nothing here ever writes to the user's files.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlp_mixer.data.image import SUFFIXES
from mlp_mixer.errors import UserError, near_names

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
LAYOUT = "class folders: FOLDER/train/<class>/*.jpg (val/ and test/ if you have them)"


def split_named(name: str) -> str | None:
    """Returns the split that a name means: "Val" -> "validation"; None if it means none."""
    return next((s for s, names in SPLIT_FOLDERS.items() if name.casefold() in names), None)


def image_files(folder: Path) -> list[Path]:
    """Returns the image files in the folder at any depth, by their endings, sorted; none hidden."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if path.name[0] != "." and not path.is_dir())


def natural_order(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """The sort key under which class "2" comes before class "10"."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts], name


def subfolders(folder: Path) -> list[str]:
    """Returns the names of the folders directly in a folder, in natural order; none hidden."""
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."]
    return sorted(names, key=natural_order)


def read_class_folders(folder: Path) -> dict[str, list[Path]]:
    """Returns the images of FOLDER/<class>/, at any depth below the class, for each class.

    Raises:
        UserError: there are no class folders, a class is empty, or two differ in case only.
    """
    classes = subfolders(folder)
    if not classes:
        raise UserError("no class folders found", where=folder, fix=f"Arrange it as {LAYOUT}")
    seen: dict[str, str] = {}
    for name in classes:
        twin = seen.setdefault(name.casefold(), name)
        if twin != name:
            what = f"class folders that differ only in case: {twin}, {name}"
            raise UserError(what, where=folder, fix="Merge or rename them")
    images = {name: image_files(folder / name) for name in classes}
    for name, found in images.items():
        if not found:
            raise UserError(
                f"class {name!r} has no images",
                where=folder / name,
                fix=f"Put images there ({' '.join(SUFFIXES)}) or remove the folder",
            )
    return images


def find_splits(name: str) -> dict[str, Path]:
    """Returns the folder of each split, train first; a folder of classes is its own train split.

    A folder that is named like a split but has no folders in it is a class of that name.

    Raises:
        UserError: there is no such folder, or it cannot be told which split a folder is.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        parent = folder.absolute().parent
        siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        near = near_names(folder.name, siblings)
        fix = f"{near}Give 'digits' or {LAYOUT}"
        raise UserError(f"no such data: {name!r}", where=folder.absolute(), fix=fix)
    if not folder.is_dir():
        raise UserError(f"not a folder: {name!r}", where=folder, fix=f"Give {LAYOUT}")
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
    known = {each for path in splits.values() for each in inside[path.name]}
    for entry, classes in inside.items():
        if folder / entry not in splits.values() and known & set(classes):
            what = f"the folder {entry!r} has the same classes, but its name is no split's"
            raise UserError(what, where=folder / entry, fix="Name it val or test, or move it away")
    return {split: splits[split] for split in SPLIT_FOLDERS if split in splits}
