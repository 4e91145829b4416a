"""Folders of images: which files count, class folders, and which folder or file is which split.

Nothing here ever writes to the user's files.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from allmlp.data.classes import natural_order, refuse_twins
from allmlp.data.image import SUFFIXES
from allmlp.data.items import ImageFiles, PackedStrings, no_labels
from allmlp.errors import UserError

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
# Images that are not read, but counted and named where a folder of images has some.
_UNREAD = frozenset(
    re.findall(
        r"\.\w+",
        """.heic .heif .hif .jxl .jxr .jp2 .j2k .jpf .jpx .jpm .svg .psd .psb .xcf .tga .ico .eps
        .dng .raw .cr2 .cr3 .crw .nef .nrw .arw .sr2 .srf .srw .orf .rw2 .rwl .raf .pef .3fr .iiq
        .x3f .exr .hdr .dcm .dicom .fits .npy .pfm .dds .qoi .pcx .sgi .ras .wmf .emf .pict""",
    )
)
# What a NAS, an archive or a file system adds; thumbnails of the images, for example.
_OF_THE_SYSTEM = frozenset(
    (
        *("@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin"),
        *("system volume information", "lost+found"),
    )
)
LAYOUT = "class folders: FOLDER/train/<class>/*.jpg (val/ and test/ if you have them)"


def split_named(name: str) -> str | None:
    """Returns the split that a name means: "Val", "val_set" -> "validation"; None for others."""
    word = re.sub(r"[-_. ]?(dataset|sets?|data|images|imgs)$", "", name.casefold())
    return next((split for split, names in SPLIT_FOLDERS.items() if word in names), None)


def split_of_file(path: Path) -> str:
    """Returns the split that a file's name has a word for: "x_test.parquet" -> "test"; else train.

    Raises:
        UserError: the name has words for two splits.
    """
    found = re.split(r"[-_.:]", path.name.casefold())
    words = {split for split, names in SPLIT_FOLDERS.items() if not set(names).isdisjoint(found)}
    if len(words) > 1:
        what = f"the file's name has words for several splits: {path.name}"
        raise UserError(what, where=path, fix="Rename the file, such as to NAME-train.parquet")
    return words.pop() if words else "train"


def image_files(folder: Path) -> list[Path]:
    """Returns the image files in the folder at any depth, by their endings, sorted; none hidden."""
    return [folder / name for name in scan_images(str(folder))]


def scan_images(
    folder: str, inside: str = "", passed_over: Counter[str] | None = None
) -> Iterator[str]:
    """Yields the image files in the folder at any depth, as paths relative to it.

    Sorted, folder by folder. Hidden files and folders are passed over; a link to a file is one, a
    link to a folder deep inside is not followed, so that no circle of links is walked forever.

    Args:
        folder: to scan.
        inside: the folder in it to begin at.
        passed_over: counts the other files: by ending where they seem to be images, else as "".

    Raises:
        UserError: a folder cannot be read.
    """
    for entry in _entries(os.path.join(folder, inside)):
        if _is_hidden(entry.name):
            continue
        path = os.path.join(inside, entry.name)
        if _is_folder(entry):
            if not entry.is_symlink():
                yield from scan_images(folder, path, passed_over)
            continue
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in SUFFIXES:
            yield path
        elif passed_over is not None:  # ".jpg_large" seems to be an image, too
            passed_over[suffix if suffix in _UNREAD or suffix.startswith(SUFFIXES) else ""] += 1


def say_passed_over(passed_over: Counter[str], folder: Path | None = None) -> tuple[str, ...]:
    """Returns the note on the files that seem to be images and are not read; none for none."""
    named = Counter({suffix: count for suffix, count in passed_over.items() if suffix})
    number = named.total()
    if not number:
        return ()
    where = f" in {folder.name}" if folder else ""
    fix = "convert them to JPEG or PNG to use them"
    files = f"{number:,} file{'' if number == 1 else 's'}"
    return (f"{files} passed over{where}: {_listed(named)} ({fix})",)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name or 'other files'} {count:,}" for name, count in counts.most_common(12))


def no_images(folder: Path, what: str = "the folder") -> UserError:
    """Returns the error for a folder without images, which says what lies there instead."""
    passed_over: Counter[str] = Counter()
    for _ in scan_images(str(folder), passed_over=passed_over):
        pass
    fix = f"Images end in {' '.join(SUFFIXES)}"
    if any(passed_over):
        fix = f"Convert them to JPEG or PNG. {fix}"
    there = f" that are read, but has {_listed(passed_over)}" if passed_over else ""
    return UserError(f"{what} has no images{there}", where=folder.absolute(), fix=fix)


def _is_hidden(name: str) -> bool:
    return name[0] == "." or name.casefold() in _OF_THE_SYSTEM


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file that cannot be read
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    is_named_so = os.path.splitext(entry.name)[1].lower() in SUFFIXES
    return not _is_hidden(entry.name) and is_named_so and not _is_folder(entry)


def _loose_image(folder: Path) -> str | None:
    """The name of an image directly in the folder, if there is one."""
    return next((entry.name for entry in _entries(str(folder)) if _is_image(entry)), None)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder: {error.strerror}", where=folder) from error


def subfolders(folder: Path) -> list[str]:
    """Returns the names of the folders directly in a folder, in natural order; none hidden."""
    entries = _entries(str(folder))
    names = [entry.name for entry in entries if not _is_hidden(entry.name) and _is_folder(entry)]
    return sorted(names, key=natural_order)


def class_folder(folder: Path, name: str, notes: tuple[str, ...] = ()) -> ImageFiles:
    """Returns the images of FOLDER/<class>/, at any depth below the class, as a source.

    Raises:
        UserError: there are no class folders, or a class is empty.
    """
    classes = subfolders(folder)
    if not classes:
        raise UserError("no class folders found", where=folder, fix=f"Arrange it as {LAYOUT}")
    counts, passed_over = array("q"), Counter[str]()

    def paths() -> Iterator[str]:
        for each in classes:
            counts.append(0)
            for path in scan_images(str(folder / each), passed_over=passed_over):
                counts[-1] += 1
                yield os.path.join(each, path)
            if counts[-1] == 0:
                raise no_images(folder / each, f"class {each!r}")

    packed = PackedStrings(paths())
    labels = np.repeat(np.arange(len(classes)), counts)
    names = [each.strip() or each for each in classes]
    return ImageFiles(
        name, names, labels, packed, str(folder), (*notes, *say_passed_over(passed_over, folder))
    )


def refuse_other_folders(folder: Path) -> None:
    """Refuses folders in the place of classes that are splits, folds or wrappers in truth.

    A class may be called "train" where its folder's own name is a split's: FOLDER/train/train.

    Raises:
        UserError: they are, or names of classes look the same.
    """
    classes = subfolders(folder)
    refuse_twins(classes, folder)
    listed = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" * (len(classes) > 8))
    shared = _shared_subfolders(folder, classes)
    if any(map(split_named, shared)) or (len(shared) > 1 and len(classes) > 1):
        what = f"each of the folders {listed} has subfolders {', '.join(shared[:8])}: not classes"
        fix = f"Give the folder to use, such as {folder / classes[0]}. If they are the classes: put"
        fix += " the images directly into their folders, or give a list (.csv) with path,label"
        raise UserError(what, where=folder, fix=fix)
    splits = [each for each in classes if split_named(each)]
    parts = [each for each in classes if split_named(each) or re.fullmatch(_FOLD, each)]
    is_split = split_named(folder.absolute().name) is not None
    if parts == classes and len(classes) > is_split:
        what = f"folders that are splits and have no class folders in them: {listed}"
        raise UserError(what, where=folder, fix=f"Arrange it as {LAYOUT}")
    if splits and not is_split:
        what = f"the folder {splits[0]!r} is named as a split, but lies among classes: {listed}"
        fix = (
            f"Put its images into class folders, {splits[0]}/<class>, or move it away. If it is a "
        )
        fix += f"class: move all class folders into one for the split, {folder / 'train'}/<class>"
        raise UserError(what, where=folder / splits[0], fix=fix)
    known: dict[tuple[str, ...], tuple[str, str]] = {}
    for each in classes:  # seg_train, seg_test
        words = re.split(r"[-_. ]+", each)
        for split, at in ((split_named(word), at) for at, word in enumerate(words)):
            rest = (*words[:at], "", *words[at + 1 :])
            if split and known.setdefault(rest, (split, each))[0] != split:
                what = f"the folders {known[rest][1]} and {each} are splits, not classes"
                fix = f"Rename them to train, val and test, with the classes below: {LAYOUT}"
                raise UserError(what, where=folder, fix=fix)


_FOLD = r"(?i)folds?[-_. ]?\d+"


def _shared_subfolders(folder: Path, classes: list[str]) -> list[str]:
    """The subfolders that each of these folders has; none where one has images directly in it."""
    shared: set[str] | None = None
    for each in classes:
        names = subfolders(folder / each)
        shared = set(names) if shared is None else shared & set(names)
        if not shared or _loose_image(folder / each) is not None:
            return []
    return sorted(shared or (), key=natural_order)


def flat_folder(folder: Path, name: str) -> ImageFiles:
    """Returns the images in a folder at any depth as a source without labels.

    Raises:
        UserError: there are none.
    """
    passed_over: Counter[str] = Counter()
    paths = PackedStrings(scan_images(str(folder), passed_over=passed_over))
    if not len(paths):
        raise no_images(folder)
    notes = say_passed_over(passed_over, folder)
    return ImageFiles(name, *no_labels(len(paths)), paths, str(folder), notes)


def find_splits(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Returns the folder of each split, train first; a folder of classes is its own train split.

    A folder that is named like a split but has no folders in it is none. Of test/test/<class> the
    inner one is the split.

    Returns:
        the folders, and the names of others with images, which are not used.

    Raises:
        UserError: it cannot be told which split a folder is.
    """
    splits: dict[str, Path] = {}
    known: set[str] = set()
    others: dict[str, list[str]] = {}
    for entry in subfolders(folder):
        split, path, classes = split_named(entry), folder / entry, subfolders(folder / entry)
        loose = _loose_image(path) if split and classes else None
        if len(classes) == 1 and split and split_named(classes[0]) == split and not loose:
            path /= classes[0]
            classes = subfolders(path)
            loose = _loose_image(path) if classes else None
        if split is None or not classes:
            others[entry] = classes
            continue
        if split in splits:
            inside = [each.relative_to(folder) for each in (splits[split], path)]
            what = f"two folders for one split: {inside[0]} and {inside[1]}"
            raise UserError(what, where=folder, fix="Merge them or rename one")
        if loose is not None:
            what = f"the folder {path.name!r} has both folders and images, such as {loose!r}"
            fix = "Put the images into class folders; a class needs another name than a split"
            raise UserError(what, where=path, fix=fix)
        splits[split] = path
        known.update(classes)
    if not splits:
        return {"train": folder}, []
    for entry, classes in others.items():
        if known & set(classes):
            what = f"the folder {entry!r} has the same classes, but its name is no split's"
            raise UserError(what, where=folder / entry, fix="Name it val or test, or move it away")
    unused = [entry for entry in others if next(scan_images(str(folder / entry)), None)]
    return {split: splits[split] for split in SPLIT_FOLDERS if split in splits}, unused
