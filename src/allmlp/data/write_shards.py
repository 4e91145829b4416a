"""Writing tar shards and their index; see `shards` for the layout.

Everything is written into a hidden folder first and renamed at the end, the indices last. A kill
between renames is known by the list of names in that folder. The same images give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from allmlp.data.folders import SPLIT_FOLDERS, split_named
from allmlp.data.image import EncodedImage
from allmlp.data.items import BadImage, Source
from allmlp.data.shards import PACKING, PUBLISHED, Shard, ShardIndex, half_published, index_path
from allmlp.errors import UserError
from allmlp.io import atomic_write, fsync, staging_folder

SHARD_BYTES = 256 * 10**6
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_SUFFIXES = {"JPEG": "jpg", "TIFF": "tif"}  # of the other formats, the name in small letters


@dataclass(frozen=True)
class Packed:
    """What was written of one split.

    Attributes:
        num_images: in the shards.
        shards: the tar files.
        bad: the images that were left out, as they cannot be read.
    """

    num_images: int
    shards: list[Shard]
    bad: list[BadImage]


def pack(
    source: Source,
    folder: Path,
    split: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_item: Callable[[int], None] | None = None,
) -> Packed:
    """Writes one split of a source as tar shards with an index; as `pack_splits`.

    Raises:
        UserError: as `pack_splits`.
    """
    packed = pack_splits({split: source}, folder, shard_bytes=shard_bytes, on_item=on_item)
    return packed[split_named(split) or split]


def pack_splits(
    splits: Mapping[str, Source],
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_item: Callable[[int], None] | None = None,
) -> dict[str, Packed]:
    """Writes the splits of a data set as tar shards with an index each.

    The order and the bytes of the images stay. One whose header cannot be read is left out.

    Args:
        splits: by name, train, validation and test.
        folder: where to; made if it is not there.
        shard_bytes: begin another shard before one is larger; an image is never divided.
        on_item: called with 1 after every image.

    Raises:
        UserError: the folder has shards of such a split already, no image of a split can be read,
            or the size is no size. Nothing is left behind.
    """
    if shard_bytes < 1:
        raise UserError(f"shard_bytes must be at least 1, got {shard_bytes}")
    named: dict[str, Source] = {}
    for name, source in splits.items():
        split = split_named(name)
        if split is None:
            fix = f"Known: {', '.join(SPLIT_FOLDERS)}"
            raise UserError(f"no split is called {name!r}", where=folder, fix=fix)
        named[split] = source
    if folder.exists() and not folder.is_dir():
        raise UserError("the output is a file", where=folder, fix="Give the name of a folder")
    made = next((each for each in [*reversed(folder.parents), folder] if not each.exists()), None)
    folder.mkdir(parents=True, exist_ok=True)
    done = False
    try:
        with staging_folder(folder / PACKING[1:], on_left=_take_back) as aside:
            _check_target(folder, list(named))
            packed = {
                split: _write(source, aside, split, shard_bytes, on_item)
                for split, source in named.items()
            }
            _check_target(folder, list(named))  # nobody else may have come first
            try:
                _publish(packed, aside)
            except BaseException:
                _take_back(aside)
                raise
        done = True
    finally:
        if not done and made is not None:
            _remove_empty(folder, made)
    return packed


def _publish(packed: Mapping[str, Packed], aside: Path) -> None:
    """Renames everything into the folder above."""
    names = [shard.name for each in packed.values() for shard in each.shards]
    # Train last: of a kill in between, no training set without its test set can be left.
    indices = [index_path(aside, split).name for split in sorted(packed, key="train".__eq__)]
    atomic_write(aside / PUBLISHED, "\n".join([*names, *indices]).encode())
    fsync(aside)
    for batch in (names, indices):
        for name in batch:
            os.rename(aside / name, aside.parent / name)
        fsync(aside.parent)


def _take_back(aside: Path) -> None:
    """Removes what was renamed of a set of files that is not complete."""
    for name in half_published(aside):
        (aside.parent / name).unlink(missing_ok=True)


def _check_target(folder: Path, splits: list[str]) -> None:
    """Refuses a folder that has shards or an index of one of the splits already."""
    for split in splits:
        found = [*folder.glob(f"{split}-*.tar"), *folder.glob(index_path(folder, split).name)]
        if found:
            what = f"the folder has shards of {split} already: {found[0].name}"
            raise UserError(what, where=folder, fix="Give another folder, or remove them")


def _write(
    source: Source,
    folder: Path,
    split: str,
    shard_bytes: int,
    on_item: Callable[[int], None] | None,
) -> Packed:
    offsets, lengths, numbers, labels = array("q"), array("q"), array("i"), array("q")
    names, name_ends = bytearray(), array("q", [0])
    shards: list[Shard] = []
    bad: list[BadImage] = []
    prefix = _common_folder(source)
    writer: _ShardWriter | None = None
    try:
        for index in range(len(source)):
            name = source.item_name(index)
            try:
                data = source.read(index)
                kind = EncodedImage(data, name).format
            except UserError as error:
                bad.append(BadImage(index, name, error.what))
                continue
            finally:
                if on_item is not None:
                    on_item(1)
            label = int(source.labels[index])
            if writer is not None and writer.size_with(len(data)) > shard_bytes:
                shards.append(writer.finish())
                writer = None
            if writer is None:
                writer = _ShardWriter(folder / f"{split}-{len(shards):06d}.tar")
            key = f"{len(labels):08d}"
            offsets.append(writer.add(f"{key}.{_SUFFIXES.get(kind, kind.lower())}", data))
            writer.add(f"{key}.cls", str(label).encode())
            lengths.append(len(data))
            numbers.append(len(shards))
            labels.append(label)
            names += os.fsencode(name.removeprefix(prefix))
            name_ends.append(len(names))
        if writer is None:
            what = f"none of the {len(source)} images can be read"
            reason = f"; the first: {bad[0].what}" if bad else ""
            raise UserError(what + reason, where=source.name)
        shards.append(writer.finish())
    finally:
        if writer is not None:
            writer.close()
    index = ShardIndex(
        list(source.class_names),
        shards,
        shard=np.array(numbers, dtype=np.int32),
        offset=np.array(offsets, dtype=np.int64),
        length=np.array(lengths, dtype=np.int64),
        label=np.array(labels, dtype=np.int64),
        names=np.frombuffer(bytes(names), dtype=np.uint8),
        name_ends=np.array(name_ends, dtype=np.int64),
    )
    index.save(index_path(folder, split))
    return Packed(len(labels), shards, bad)


class _ShardWriter:
    """Writes one tar file; its sum is known when its last byte is written."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._sum = path, 0, hashlib.sha256()
        self._file: BinaryIO = path.open("wb")

    def add(self, name: str, data: bytes) -> int:
        """Adds a member; returns where its data begin."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._put(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._size
        self._put(data)
        self._put(bytes(-len(data) % _BLOCK))
        return offset

    def size_with(self, length: int) -> int:
        """The size of the whole file if an image of this length is added."""
        return self._size + 3 * _BLOCK + -(-length // _BLOCK) * _BLOCK + len(_END)

    def finish(self) -> Shard:
        """Ends the file and flushes it to the disk."""
        self._put(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return Shard(self._path.name, self._size, self._sum.hexdigest())

    def close(self) -> None:
        """Closes the file as it is."""
        self._file.close()

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._sum.update(data)
        self._size += len(data)


def _common_folder(source: Source) -> str:
    """What the names of all images begin with, up to a slash."""
    prefix = source.item_name(0) if len(source) else ""
    prefix = prefix[: prefix.rfind("/") + 1]
    for index in range(len(source)):
        while not source.item_name(index).startswith(prefix):
            prefix = prefix[: prefix.rstrip("/").rfind("/") + 1]
    return prefix


def _remove_empty(folder: Path, top: Path) -> None:
    """Removes the folders that were made for nothing, from the inside out."""
    for each in [folder, *folder.parents]:
        try:
            each.rmdir()
        except OSError:
            return
        if each == top:
            return
