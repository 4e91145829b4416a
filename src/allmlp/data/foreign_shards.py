"""Tars in the WebDataset style: an index for those that other tools wrote, and a check of all."""

from __future__ import annotations

import hashlib
import os
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from allmlp.data.classes import label_text, labels_of_values
from allmlp.data.folders import SPLIT_FOLDERS, natural_order, split_of_file
from allmlp.data.image import SUFFIXES
from allmlp.data.shards import PACKING, Shard, ShardIndex, index_path, load_index
from allmlp.errors import UserError
from allmlp.io import atomic_write, parse_json

_LABEL_BYTES = 2**20  # a .cls or .json above that is none


def index_shards(folder: Path, *, labels: bool = True) -> list[Path]:
    """Writes an index beside the tars that another tool wrote; returns the files written.

    A member KEY.jpg (or .png, ...) has its label in KEY.cls, an integer or text, or in KEY.json
    under "label" or "cls". Of images only the headers in the tar are read, so no sum of the shards
    is in such an index. The split is read from the names of the tars, as "x-val-000000.tar".

    Args:
        folder: with the tars.
        labels: whether there are labels; without them the index is for predictions only, and
            whatever labels there are, are passed over.

    Raises:
        UserError: there are no tars, or there is an index already, a tar is damaged or compressed,
            or an image has no label.
    """
    for aside in folder.glob(f"{PACKING}*"):  # at whatever stage: these tars are not another tool's
        what = f"the folder holds {aside.name}, which an unfinished mixer data pack left"
        fix = "Run the same mixer data pack again; or remove it, and the tars that it wrote"
        raise UserError(what, where=folder, fix=fix)
    by_split: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.tar"), key=lambda path: natural_order(path.name)):
        by_split.setdefault(split_of_file(path), []).append(path)
    if not by_split:
        raise UserError("the folder has no .tar files", where=folder)
    for split in SPLIT_FOLDERS:
        if index_path(folder, split).exists():
            raise UserError("the folder has an index already", where=index_path(folder, split))
    indices = {split: _index(paths, labels) for split, paths in by_split.items()}
    written: list[Path] = []
    for split in sorted(indices, key=lambda split: split == "train"):
        path = index_path(folder, split)
        atomic_write(path, indices[split].save)
        written.append(path)
    return written


def _index(paths: list[Path], labelled: bool) -> ShardIndex:
    offsets, lengths, numbers, codes = array("q"), array("q"), array("i"), array("q")
    names, name_ends = bytearray(), array("q", [0])
    values: dict[str, int] = {}
    shards: list[Shard] = []
    for path in paths:
        for member, label in _samples(path, labelled):
            codes.append(values.setdefault(label, len(values)))
            offsets.append(member.offset_data)
            lengths.append(member.size)
            numbers.append(len(shards))
            names += os.fsencode(member.name)
            name_ends.append(len(names))
        shards.append(Shard(path.name, path.stat().st_size, None))
    if not len(codes):
        raise UserError("the tars have no images", where=paths[0], fix=f"Endings: {SUFFIXES}")
    labels, class_names = np.full(len(codes), -1, dtype=np.int64), []
    if labelled:

        def where(at: int) -> str:
            name = os.fsdecode(bytes(names[name_ends[at] : name_ends[at + 1]]))
            return f"{paths[0].parent / shards[numbers[at]].name}:{name}"

        labels, class_names = labels_of_values(np.array(codes), list(values), where)
    return ShardIndex(
        class_names,
        shards,
        shard=np.array(numbers, dtype=np.int32),
        offset=np.array(offsets, dtype=np.int64),
        length=np.array(lengths, dtype=np.int64),
        label=labels,
        names=np.frombuffer(bytes(names), dtype=np.uint8),
        name_ends=np.array(name_ends, dtype=np.int64),
    )


def _samples(path: Path, labelled: bool = True) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yields every image of a tar with its label, or with "" where labels are not looked at.

    The members of a sample lie one after another.
    """
    key, image, label = "", None, None
    for member, text in _ended(_members(path)):
        folder, _, base = ("", "", "") if member is None else member.name.rpartition("/")
        if base.startswith("."):  # what macOS adds, and other hidden files
            continue
        stem, _, ending = base.partition(".")
        this = f"{folder}/{stem}"
        if member is None or this != key:
            if image is not None:
                if label is None and labelled:
                    what = f"the image has no label: {image.name}"
                    fix = "Every KEY.jpg needs a KEY.cls, or a KEY.json with a label; or, to "
                    fix += f"predict only: mixer data index {path.parent} --unlabelled"
                    raise UserError(what, where=path, fix=fix)
                yield image, label or ""
            key, image, label = this, None, None
        if member is None:
            return
        if text is not None and labelled:
            label = _label(ending.lower(), text, f"{path}:{member.name}") or label
        elif text is None and os.path.splitext(base)[1].lower() in SUFFIXES:
            if image is not None:
                what = f"two images of one sample: {image.name}, {member.name}"
                raise UserError(what, where=path, fix="A sample has one image")
            image = member


def _ended(
    members: Iterator[tuple[tarfile.TarInfo, bytes | None]],
) -> Iterator[tuple[tarfile.TarInfo | None, bytes | None]]:
    yield from members
    yield None, None


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Yields the files of a tar, of a .cls or .json with what is in it."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members = []  # it would keep a list of them all
                if not member.isreg():
                    continue
                text = None
                if member.name.lower().endswith((".cls", ".json")):
                    file = tar.extractfile(member)
                    text = b"" if file is None else file.read(_LABEL_BYTES)
                yield member, text
            # A damaged header in the middle looks to tarfile like the end.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end and no member at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        what = f"the tar is damaged, cut short or compressed: {error}"
        raise UserError(what, where=path, fix="Fetch it again; unpack .gz first") from error


def _label(ending: str, text: bytes, where: str) -> str | None:
    """The label in a .cls or .json; None where a .json has none."""
    try:
        if ending.endswith("json"):
            value = parse_json(text)
            value = value.get("label", value.get("cls")) if isinstance(value, dict) else None
            if value is None:
                return None
        else:
            value = text.decode().strip()
    except ValueError as error:
        raise UserError(f"the label cannot be read: {error}", where=where) from error
    try:
        return label_text(value)
    except UserError as error:
        raise UserError(error.what, where=where, fix=error.fix) from None


def verify(folder: Path) -> list[str]:
    """Reads every shard of a folder again; returns what is wrong, a line for each, or nothing.

    Compared are the sums of the shards (not of those that other tools wrote), and for every image
    that its place is that of a member of the tar with its length and its label.

    Args:
        folder: with an index.

    Raises:
        UserError: an index cannot be read.
    """
    problems: list[str] = []
    for split in SPLIT_FOLDERS:
        path = index_path(folder, split)
        if path.exists():
            index = load_index(path)
            for number, shard in enumerate(index.shards):
                problems += _verify_shard(folder / shard.name, shard, index, number)
    return problems


def _verify_shard(path: Path, shard: Shard, index: ShardIndex, number: int) -> list[str]:
    try:
        size = path.stat().st_size
        if size != shard.size:
            return [f"{path}: {size:,} bytes, the index says {shard.size:,}"]
        problems: list[str] = []
        if shard.sha256 is not None:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                problems.append(f"{path}: sha256 {found}, the index says {shard.sha256}")
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    members: dict[int, tuple[int, str | None]] = {}
    try:
        for member, label in _samples(path, bool(index.class_names)):
            members[member.offset_data] = member.size, label
    except UserError as error:
        return [*problems, f"{path}: {error.what}"]
    for at in np.flatnonzero(index.shard == number).tolist():
        offset, length, label = (int(getattr(index, n)[at]) for n in ("offset", "length", "label"))
        size, text = members.get(offset, (None, None))
        name = f"{path}:{index.name_of(at)}"
        if size is None:
            problems.append(f"{name}: no member of the tar begins at byte {offset}")
        elif size != length:
            problems.append(f"{name}: {size} bytes in the tar, the index says {length}")
        elif index.class_names and text not in (str(label), index.class_names[label]):
            expected = index.class_names[label]
            problems.append(f"{name}: label {text!r} in the tar, the index says {expected!r}")
    return problems
