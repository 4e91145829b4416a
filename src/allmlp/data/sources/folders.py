"""Folders of images, also in zip and tar files: image files, class folders and split folders."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from allmlp.data import archive
from allmlp.data.classes import RawLabels, check_twins, natural_order
from allmlp.data.image import HEIC, SUFFIXES
from allmlp.data.source import GROUP, ImageFiles, Images, PackedStrings, unlabelled
from allmlp.data.source_spec import SPLITS, SourceSpec, split_named
from allmlp.data.sources.columns import Kind, Rows
from allmlp.errors import UserError, plural, some_of
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
_SYSTEM = {"@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin"}
_SYSTEM |= {"system volume information", "lost+found"}
_FOLD = r"(?i)folds?[-_. ]?\d+"
LAYOUT = "class folders: FOLDER/train/<class>/*.jpg (val/ and test/ if you have them)"


def open_folders(spec: SourceSpec, labels: bool) -> Iterator[Rows]:
    """Yields the images in FOLDER/<split>/<class>/ or FOLDER/<class>/, at any depth."""
    folder, group = spec.path, spec.options.get(GROUP)
    # photos.zip/photos, if that is all there is in photos.zip, and has folders
    while archive.is_archive(folder) and len(inner := subfolders(folder)) == 1:
        if split_named(inner[0]) or loose_image(folder) or not subfolders(folder / inner[0]):
            break
        folder /= inner[0]
    if not labels and not subfolders(folder):
        images, _, note = _images(folder, [""])
        if not len(images):
            raise no_images(folder)
        yield Rows(images, {}, "train", notes=note)
        return
    splits, unused = _find_splits(folder)
    notes: tuple[str, ...] = ()
    if labels:
        for path in splits.values():
            _check_class_folders(path, group)
        if unused:
            notes = (f"not used: {', '.join(unused)} (not splits with class folders)",)
    for split, path in splits.items():
        classes = subfolders(path)
        if not classes:
            raise UserError("no class folders found", where=path, fix=f"Arrange it as {LAYOUT}")
        found, counts, note = _images(path, classes)
        images: Images = found
        if group is not None:
            groups = PackedStrings(_group_of(file, group, path) for file in found.paths)
            images = replace(unlabelled(found, str(path)), columns={GROUP: groups})
        if 0 in counts:
            empty = classes[counts.index(0)]
            raise no_images(path / empty, f"class {empty!r}")
        labels_of = np.repeat(np.arange(len(classes)), counts)
        raw = RawLabels(labels_of, [name.strip() or name for name in classes], are_classes=True)
        yield Rows(images, {"label": lambda raw=raw: raw}, split, notes=(*notes, *note))


def _images(folder: Path, inside: list[str]) -> tuple[ImageFiles, list[int], tuple[str, ...]]:
    """Returns the images, how many of them each folder inside has, and a note."""
    counts, passed_over = [0] * len(inside), Counter[str]()

    def paths() -> Iterator[str]:
        for at, name in enumerate(inside):
            for path in scan_images(str(folder), name, passed_over):
                counts[at] += 1
                yield path

    images = ImageFiles(PackedStrings(paths()), str(folder))
    return images, counts, passed_over_note(passed_over, folder)


def scan_images(
    folder: str,
    inside: str = "",
    passed_over: Counter[str] | None = None,
    above: tuple[str, ...] = (),
) -> Iterator[str]:
    """Yields image paths below `inside`, relative to the folder; counts others in `passed_over`."""
    here = os.path.realpath(os.path.join(folder, inside))
    if any(os.path.join(one, "").startswith(os.path.join(here, "")) for one in above):
        return  # a link to a folder above
    for name, is_folder in _entries(os.path.join(folder, inside)):
        path, suffix = os.path.join(inside, name), os.path.splitext(name)[1].lower()
        if is_folder:
            yield from scan_images(folder, path, passed_over, (*above, here))
        elif suffix in SUFFIXES:
            yield path
        elif passed_over is not None:  # ".jpg_large" looks like an image, too
            passed_over[suffix if suffix in _UNREAD or suffix.startswith(SUFFIXES) else ""] += 1


def passed_over_note(passed_over: Counter[str], folder: Path | None = None) -> tuple[str, ...]:
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
    there = f" that are read, but has {_listed(passed_over)}" if passed_over else ""
    fix = f"Convert images to JPEG or PNG; they end in {' '.join(SUFFIXES)}"
    return UserError(f"{what} has no images{there}", where=folder.absolute(), fix=fix)


def _entries(folder: str) -> list[tuple[str, bool]]:
    inside = None if os.path.isdir(folder) else archive.entries(folder)
    if inside is not None:
        found = [*inside.items()]
    else:
        with os.scandir(folder) as entries:
            found = [(entry.name, _is_folder(entry)) for entry in entries]
    return sorted(e for e in found if e[0][0] != "." and e[0].casefold() not in _SYSTEM)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: unreadable
        return False


def loose_image(folder: Path) -> str | None:
    files = (name for name, is_folder in _entries(str(folder)) if not is_folder)
    return next((name for name in files if name.lower().endswith(SUFFIXES)), None)


def subfolders(folder: Path) -> list[str]:
    names = (name for name, is_folder in _entries(str(folder)) if is_folder)
    return sorted(names, key=natural_order)


def _group_of(path: str, group: str, folder: Path) -> str:
    """The folder inside the class folder, or what stands before a mark in the file's name."""
    parts = path.split(os.sep)
    found = parts[1] if len(parts) > 2 else ""
    if group != "folder":
        found = parts[-1].partition(group)[0] if group in parts[-1] else ""
    if not found:
        fix = "group=folder (<class>/<group>/*.jpg), or a mark in all names: group=_ (p1_07.jpg)"
        raise UserError(f"no group={group} in the name of an image", where=folder / path, fix=fix)
    return found


def _check_class_folders(folder: Path, group: str | None) -> None:
    """Checks that the class folders are not actually splits, folds or wrapper folders."""
    classes = subfolders(folder)
    check_twins(classes, folder)
    shared: set[str] = set()  # subfolders of every class
    if classes and not any(loose_image(folder / name) for name in classes):
        shared = set.intersection(*(set(subfolders(folder / name)) for name in classes))
    if any(map(split_named, shared)) or (group is None and min(len(shared), len(classes)) > 1):
        inner = some_of(sorted(shared, key=natural_order))
        what = f"each of the folders {some_of(classes)} has subfolders {inner}: not classes"
        fix = f"Give the folder to use, such as {folder / classes[0]}, or a list with path,label"
        raise UserError(what, where=folder, fix=fix)
    is_split = split_named(folder.absolute().name) is not None
    suspects = [name for name in classes if split_named(name) or re.fullmatch(_FOLD, name)]
    if len(suspects) < max(len(classes), is_split + 1):  # not all of them
        # seg_train and seg_test: names that differ only by the split
        words = {name: re.split(r"[-_. ]+", name) for name in classes}
        rests = {n: [w for w in own if not split_named(w)] or [n] for n, own in words.items()}
        twins = [n for n in classes if [*rests.values()].count(rests[n]) > 1]
        alike = [name for name in twins if rests[name] != words[name]]
        suspects = alike or [name for name in classes if split_named(name) and not is_split]
    if suspects:
        what = f"folders of {some_of(classes)} are named as splits, without class folders: "
        fix = f"Arrange it as {LAYOUT}; if it is a class, put all into {folder / 'train'}/<class>"
        raise UserError(f"{what}{suspects[:8]}", where=folder, fix=fix)


def _find_splits(folder: Path) -> tuple[dict[str, Path], list[str]]:
    splits: dict[str, Path] = {}
    known: set[str] = set()
    others: dict[str, list[str]] = {}
    for entry in subfolders(folder):
        split, path, classes = split_named(entry), folder / entry, subfolders(folder / entry)
        if split and [split_named(name) for name in classes] == [split] and not loose_image(path):
            path /= classes[0]
            classes = subfolders(path)
        if split is None or not classes:
            others[entry] = classes
            continue
        if split in splits:
            both = f"{splits[split].relative_to(folder)} and {path.relative_to(folder)}"
            fix = "Merge them or rename one"
            raise UserError(f"two folders for one split: {both}", where=folder, fix=fix)
        if loose := loose_image(path):
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
    (GROUP,),
)
