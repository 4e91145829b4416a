"""Folders of images, also in zip and tar files: image files, class folders and split folders."""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from allmlp.data import archive
from allmlp.data.classes import RawLabels, check_twins, natural_order
from allmlp.data.image import HEIC, SUFFIXES
from allmlp.data.source import ImageFiles, PackedStrings
from allmlp.data.source_spec import SPLITS, Kind, Records, SourceSpec, split_named
from allmlp.errors import UserError, plural
from allmlp.names import extra

# Image formats that are not supported, but counted and reported.
_UNREAD = frozenset(
    re.findall(
        r"\.\w+",
        """.heic .heif .hif .jxl .jxr .jp2 .j2k .jpf .jpx .jpm .svg .psd .psb .xcf .tga .ico .eps
        .dng .raw .cr2 .cr3 .crw .nef .nrw .arw .sr2 .srf .srw .orf .rw2 .rwl .raf .pef .3fr .iiq
        .x3f .exr .hdr .dcm .dicom .fits .npy .pfm .dds .qoi .pcx .sgi .ras .wmf .emf .pict""",
    )
)
# Folders added by a NAS, archive or file system; some contain thumbnails.
_SYSTEM = frozenset(
    (
        *("@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin"),
        *("system volume information", "lost+found"),
    )
)
_FOLD = r"(?i)folds?[-_. ]?\d+"
LAYOUT = "class folders: FOLDER/train/<class>/*.jpg (val/ and test/ if you have them)"


def open_folders(spec: SourceSpec, labels: bool) -> dict[str, Records]:
    """Returns the images in FOLDER/<split>/<class>/ or FOLDER/<class>/, at any depth.

    Without labels, images may also be directly in the folder.
    """
    folder = spec.path
    if archive.is_archive(folder):
        folder = _unwrapped(folder)
    if any(folder.glob("*.tar")) and not subfolders(folder):
        what = "the folder has tar files and no index of them"
        raise UserError(what, where=folder, fix=f"Write one, once: mixer data index {folder}")
    if not labels and not subfolders(folder):
        passed_over: Counter[str] = Counter()
        paths = PackedStrings(scan_images(str(folder), passed_over=passed_over))
        if not len(paths):
            raise no_images(folder)
        note = passed_over_note(passed_over, folder)
        return {"train": Records(ImageFiles(paths, str(folder)), notes=note)}
    splits, unused = _find_splits(folder)
    notes: tuple[str, ...] = ()
    if labels:
        for path in splits.values():
            _check_class_folders(path)
        if unused:
            notes = (f"not used: {', '.join(unused)} (not splits with class folders)",)
    return {split: _class_folder(path, notes) for split, path in splits.items()}


def _unwrapped(folder: Path) -> Path:
    """Returns photos.zip/photos if that is all there is in photos.zip, and has folders."""
    while len(inner := subfolders(folder)) == 1 and not split_named(inner[0]):
        if _loose_image(folder) or not subfolders(folder / inner[0]):
            break
        folder /= inner[0]
    return folder


def scan_images(
    folder: str, inside: str = "", passed_over: Counter[str] | None = None
) -> Iterator[str]:
    """Yields image paths at any depth below `inside`, relative to the folder, sorted per folder.

    Hidden files and folders are skipped. Links to files are followed, links to nested folders are
    not, since they may form cycles. `passed_over` counts other files: by extension if they look
    like images, else as "".
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
        elif passed_over is not None:  # ".jpg_large" looks like an image, too
            passed_over[suffix if suffix in _UNREAD or suffix.startswith(SUFFIXES) else ""] += 1


def passed_over_note(passed_over: Counter[str], folder: Path | None = None) -> tuple[str, ...]:
    """Returns a note on files that look like images but are not read, if any."""
    named = Counter({suffix: count for suffix, count in passed_over.items() if suffix})
    if not named:
        return ()
    where = f" in {folder.name}" if folder else ""
    fix = "convert them to JPEG or PNG to use them"
    if named.keys() & {*HEIC}:
        fix = f"HEIC: {extra('heic')}; {fix}"
    return (f"{plural(named.total(), 'file')} passed over{where}: {_listed(named)} ({fix})",)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name or 'other files'} {count:,}" for name, count in counts.most_common(12))


def no_images(folder: Path, what: str = "the folder") -> UserError:
    """Returns the error for a folder without images, naming what it contains instead."""
    passed_over: Counter[str] = Counter()
    for _ in scan_images(str(folder), passed_over=passed_over):
        pass
    fix = f"Images end in {' '.join(SUFFIXES)}"
    if any(passed_over):
        heic = f", or {extra('heic')}" if passed_over.keys() & {*HEIC} else ""
        fix = f"Convert them to JPEG or PNG{heic}. {fix}"
    there = f" that are read, but has {_listed(passed_over)}" if passed_over else ""
    return UserError(f"{what} has no images{there}", where=folder.absolute(), fix=fix)


def _is_hidden(name: str) -> bool:
    return name[0] == "." or name.casefold() in _SYSTEM


def _is_folder(entry: os.DirEntry[str] | archive.Entry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: unreadable
        return False


def _loose_image(folder: Path) -> str | None:
    """The name of an image directly in the folder, if any."""
    for entry in _entries(str(folder)):
        is_image = os.path.splitext(entry.name)[1].lower() in SUFFIXES
        if is_image and not _is_hidden(entry.name) and not _is_folder(entry):
            return entry.name
    return None


def _entries(folder: str) -> Sequence[os.DirEntry[str] | archive.Entry]:
    if not os.path.isdir(folder) and archive.is_archive(folder):
        found = archive.entries(folder)
        if found is not None:
            return sorted(found, key=lambda entry: entry.name)
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder: {error.strerror}", where=folder) from error


def subfolders(folder: Path) -> list[str]:
    """Returns the names of a folder's visible subfolders in natural order."""
    entries = _entries(str(folder))
    names = [entry.name for entry in entries if not _is_hidden(entry.name) and _is_folder(entry)]
    return sorted(names, key=natural_order)


def _class_folder(folder: Path, notes: tuple[str, ...]) -> Records:
    classes = subfolders(folder)
    if not classes:
        raise UserError("no class folders found", where=folder, fix=f"Arrange it as {LAYOUT}")
    counts, passed_over = array("q"), Counter[str]()

    def paths() -> Iterator[str]:
        for name in classes:
            counts.append(0)
            for path in scan_images(str(folder / name), passed_over=passed_over):
                counts[-1] += 1
                yield os.path.join(name, path)
            if counts[-1] == 0:
                raise no_images(folder / name, f"class {name!r}")

    images = ImageFiles(PackedStrings(paths()), str(folder))
    labels = np.repeat(np.arange(len(classes)), counts)
    raw = RawLabels(labels, [name.strip() or name for name in classes], are_classes=True)
    return Records(images, raw, (*notes, *passed_over_note(passed_over, folder)))


def _check_class_folders(folder: Path) -> None:
    """Checks that the class folders are not actually splits, folds or wrapper folders.

    A class may be called "train" if its parent is a split folder: FOLDER/train/train.
    """
    classes = subfolders(folder)
    check_twins(classes, folder)
    listed = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" * (len(classes) > 8))
    shared = _shared_subfolders(folder, classes)
    if any(map(split_named, shared)) or (len(shared) > 1 and len(classes) > 1):
        what = f"each of the folders {listed} has subfolders {', '.join(shared[:8])}: not classes"
        fix = f"Give the folder to use, such as {folder / classes[0]}. If they are the classes: put"
        fix += " the images directly into their folders, or give a list (.csv) with path,label"
        raise UserError(what, where=folder, fix=fix)
    splits = [name for name in classes if split_named(name)]
    is_split = split_named(folder.absolute().name) is not None
    # seg_train and seg_test: names that differ only by the split
    rests = Counter(rest for name in classes for rest in _without_split(name))
    are_parts = all(split_named(name) or re.fullmatch(_FOLD, name) for name in classes)
    if (are_parts and len(classes) > is_split) or max(rests.values(), default=0) > 1:
        what = f"folders that are splits and have no class folders in them: {listed}"
        fix = f"Arrange it as {LAYOUT}"
        raise UserError(what, where=folder, fix=fix)
    if splits and not is_split:
        what = f"the folder {splits[0]!r} is named as a split, but lies among classes: {listed}"
        fix = f"Put its images into class folders, {splits[0]}/<class>, or move it away. If it is a"
        fix += f" class: move all class folders into one for the split, {folder / 'train'}/<class>"
        raise UserError(what, where=folder / splits[0], fix=fix)


def _without_split(name: str) -> set[tuple[str, ...]]:
    """The words of a name without the one that names a split, for each such word."""
    words = re.split(r"[-_. ]+", name)
    places = [at for at, word in enumerate(words) if len(words) > 1 and split_named(word)]
    return {(*words[:at], "", *words[at + 1 :]) for at in places}


def _shared_subfolders(folder: Path, classes: list[str]) -> list[str]:
    """The subfolders common to all of these folders; empty if one directly contains images."""
    if not classes or any(_loose_image(folder / name) for name in classes):
        return []
    names = (set(subfolders(folder / name)) for name in classes)
    return sorted(set.intersection(*names), key=natural_order)


def _find_splits(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Returns the folder of each split, and the names of other folders with images.

    A folder of classes is the train split. A folder named like a split but without subfolders is
    not one. In test/test/<class>, the inner folder is the split.
    """
    splits: dict[str, Path] = {}
    known: set[str] = set()
    others: dict[str, list[str]] = {}
    for entry in subfolders(folder):
        split, path, classes = split_named(entry), folder / entry, subfolders(folder / entry)
        if split and [split_named(name) for name in classes] == [split] and not _loose_image(path):
            path /= classes[0]
            classes = subfolders(path)
        if split is None or not classes:
            others[entry] = classes
            continue
        if split in splits:
            inside = [path.relative_to(folder) for path in (splits[split], path)]
            what = f"two folders for one split: {inside[0]} and {inside[1]}"
            raise UserError(what, where=folder, fix="Merge them or rename one")
        loose = _loose_image(path)
        if loose is not None:
            what = f"the folder {path.name!r} has both folders and images, such as {loose!r}"
            fix = "Put the images into class folders; a class cannot have the name of a split"
            raise UserError(what, where=path, fix=fix)
        splits[split] = path
        known.update(classes)
    if not splits:
        return {"train": folder}, []
    for entry, classes in others.items():
        if known & set(classes):
            what = f"the folder {entry!r} has the same classes, but its name is not a split's"
            raise UserError(what, where=folder / entry, fix="Name it val or test, or move it away")
    unused = [entry for entry in others if next(scan_images(str(folder / entry)), None)]
    return {split: splits[split] for split in SPLITS if split in splits}, unused


KIND = Kind(
    "class folders",
    lambda spec: spec.path.is_dir() or archive.is_archive(spec.path),
    open_folders,
)
