"""Packed data: many images in few files, as fast to read in random order as in order.

A folder has Arrow files in the Hugging Face layout (a column `image` of struct<bytes, path> and one
`label`), which `datasets.Dataset.from_file` opens, and packed.json, which names them with their
sizes and checksums. That file is written last and atomically: Arrow files that it does not name are
not data. Folders of tar shards with a SPLIT.index.safetensors each are read too, see `webdataset`.

Of either an index of byte ranges is made, and images are read by position, not through a memory
map: a file that was cut short is an error then, and does not kill the process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.classes import RawLabels
from allmlp.data.fingerprint import own_names
from allmlp.data.image import EncodedImage
from allmlp.data.source import BadImage, PackedBytes, PackedStrings, Source
from allmlp.data.source_spec import SPLITS, SourceSpec
from allmlp.data.sources.kind import Kind, Records
from allmlp.data.sources.webdataset import (
    INDEX_SUFFIX,
    FileSize,
    RangeIndex,
    load_index,
    verify_tar,
)
from allmlp.errors import UserError, between
from allmlp.io import atomic_write, fsync, parse_json, staging_folder
from allmlp.names import extra, is_format

MANIFEST = "packed.json"
FORMAT, VERSION = "allmlp packed data", 1
SHARD_BYTES = 256 * 10**6
_OPEN_FILES = 64  # descriptors in each process; a process may usually have 1,024
_BATCH_IMAGES = 100  # in a record batch, whose bytes have 32-bit offsets
_ROW_BYTES, _HEADER_BYTES = 64, 4096  # at most, of an image beside its file and name; of a file
_FIX = "Pack or copy the folder again"


@dataclass
class FileRanges:
    """Images that are byte ranges of files."""

    folder: str
    index: RangeIndex
    _descriptors: OrderedDict[int, _Descriptor] = field(
        default_factory=OrderedDict, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def item_name(self, index: int) -> str:
        file = self.index.files[int(self.index.file[index])]
        return f"{os.path.join(self.folder, file.name)}:{self.index.names[index]}"

    def read(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        length = int(self.index.length[index])
        try:
            descriptor = self._descriptor(int(self.index.file[index]))
            # By position: a forked process shares the descriptor and disturbs nobody.
            data = os.pread(descriptor.number, length, int(self.index.offset[index]))
        except OSError as error:
            what = f"cannot read the file: {error.strerror}"
            raise UserError(what, where=self.item_name(index)) from error
        if len(data) != length:
            what = f"the file was cut short: {len(data)} of {length} bytes"
            raise UserError(what, where=self.item_name(index), fix=_FIX)
        return data

    def _descriptor(self, file: int) -> _Descriptor:
        found = self._descriptors.get(file)
        if found is None:
            path = os.path.join(self.folder, self.index.files[file].name)
            found = self._descriptors[file] = _Descriptor(path)
            while len(self._descriptors) > _OPEN_FILES:
                self._descriptors.popitem(last=False)
        return found


class _Descriptor:
    """An open file; it is closed once nobody uses it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def is_packed(folder: Path) -> bool:
    """Whether the folder has packed data."""
    return (folder / MANIFEST).exists() or any(
        (folder / f"{split}{INDEX_SUFFIX}").exists() for split in SPLITS
    )


def open_packed(spec: SourceSpec, labels: bool) -> dict[str, Records]:
    """Returns the splits of a folder; the sizes of its files are checked."""
    found: dict[str, Records] = {}
    indices = load_indices(spec.path)
    if not indices:
        what = "mixer data pack was killed before the data was complete"
        fix = "Run the same mixer data pack again: it starts over"
        raise UserError(what, where=spec.path, fix=fix)
    for split, index in indices.items():
        for file in index.files:
            problem = wrong_size(spec.path, file)
            if problem is not None:
                raise UserError(problem, where=spec.path / file.name, fix=_FIX)
        raw = RawLabels(index.label, index.class_names, True) if index.class_names else None
        found[split] = Records(FileRanges(str(spec.path), index), raw if labels else None)
    return found


def load_indices(folder: Path) -> dict[str, RangeIndex]:
    """Returns the index of each split of packed data."""
    manifest = _read_manifest(folder)
    found: dict[str, RangeIndex] = {}
    for split in SPLITS:
        tars = folder / f"{split}{INDEX_SUFFIX}"
        if split in manifest:
            found[split] = _index_arrow(folder, *manifest[split])
        elif tars.exists():
            found[split] = load_index(tars)
    return found


def wrong_size(folder: Path, file: FileSize) -> str | None:
    """Returns what is wrong with the size of a file, if anything."""
    try:
        size = (folder / file.name).stat().st_size
    except OSError as error:
        return f"cannot read the file: {error.strerror}"
    if size == file.size:
        return None
    return f"the file has {size:,} bytes instead of {file.size:,}"


def verify(folder: Path) -> list[str]:
    """Reads every file of packed data again; returns what is wrong, a line each."""
    problems: list[str] = []
    try:
        indices = load_indices(folder)
    except UserError as error:
        return [f"{error.where}: {error.what}"]
    for index in indices.values():
        for number, file in enumerate(index.files):
            path = folder / file.name
            problem = wrong_size(folder, file)
            if problem is not None:
                problems.append(f"{path}: {problem}")
                continue
            with path.open("rb") as opened:
                checksum = hashlib.file_digest(opened, "sha256").hexdigest()
            if file.sha256 not in (None, checksum):
                problems.append(f"{path}: the file has another checksum than it was written with")
            if path.suffix == ".tar":
                problems += verify_tar(path, index, number)
    return problems


def _read_manifest(folder: Path) -> dict[str, tuple[list[str], list[FileSize]]]:
    """The class names and the files of each split in packed.json; empty without one."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        values = parse_json(path.read_bytes())
        if not is_format(values["format"], FORMAT) or values["version"] != VERSION:
            raise ValueError(f"it is not {FORMAT}, version {VERSION}")
        found = {}
        for split, described in values["splits"].items():
            files = [FileSize(*file) for file in described["files"]]
            names = [str(name) for name in described["class_names"]]
            if any(Path(file.name).name != file.name for file in files):
                raise ValueError("a file outside the folder")
            found[split] = names, files
        return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"the list of the packed files is damaged: {error}"
        raise UserError(what, where=path, fix=_FIX) from error


def _index_arrow(folder: Path, class_names: list[str], files: list[FileSize]) -> RangeIndex:
    parts: list[tuple[np.ndarray, ...]] = []
    for number, file in enumerate(files):
        path = folder / file.name
        problem = wrong_size(folder, file)
        if problem is None:  # a file that was cut short must not be mapped
            try:
                parts += [(np.full(len(p[0]), number, np.int32), *p) for p in _batches(path)]
                continue
            except (OSError, ValueError, KeyError) as error:  # pyarrow's own are ValueErrors
                problem = f"the file is damaged: {error}"
        raise UserError(problem, where=path, fix=_FIX)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    number, offset, length, label, names, name_lengths = columns
    ends = np.concatenate([[0], np.cumsum(name_lengths)])
    packed = PackedStrings(PackedBytes.from_arrays(names, ends))
    return RangeIndex(class_names, files, number, offset, length, label, packed)


def _batches(path: Path) -> Iterator[tuple[np.ndarray, ...]]:
    """Offsets, lengths and labels of the images in an Arrow file; their names and lengths."""
    pa = _pyarrow(path)
    with pa.memory_map(str(path)) as file:
        whole = file.read_buffer()
        for batch in pa.ipc.open_stream(whole):
            image = batch.column("image")
            ends, data = _ends(image.field("bytes"))
            name_ends, names = _ends(image.field("path"))
            name_bytes = np.frombuffer(names, np.uint8)[name_ends[0] : name_ends[-1]].copy()
            offsets = data.address - whole.address + ends[:-1]
            labels = batch.column("label").to_numpy().copy()
            yield offsets, np.diff(ends), labels, name_bytes, np.diff(name_ends)


def _ends(column: Any) -> tuple[np.ndarray, Any]:
    """Where the values of a column of bytes or text begin and end, int64, and their buffer."""
    _, offsets, data = column.buffers()
    return np.frombuffer(offsets, np.int32)[: len(column) + 1].astype(np.int64), data


def _pyarrow(where: object) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc

        return pyarrow
    except ImportError as error:
        raise UserError("packed data needs pyarrow", where=where, fix=extra("data")) from error


@dataclass(frozen=True)
class Packed:
    """What was written of a split; images that cannot be read are left out and are in `bad`."""

    num_images: int
    files: list[FileSize]
    bad: list[BadImage]


def pack_splits(
    splits: Mapping[str, Source],
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_item: Callable[[int], None] | None = None,
) -> dict[str, Packed]:
    """Writes splits into a folder of packed data, all or nothing; the files keep their bytes.

    `shard_bytes` is the largest size of a file that has more than one image. The same images give
    the same files. `on_item` is called with 1 after every image.
    """
    between("shard_bytes", shard_bytes, 1, 2**31 - 1)  # offsets have 32 bits
    _pyarrow(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError("the output is a file", where=folder, fix="Give the name of a folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    done = False
    try:
        with staging_folder(folder / "packing") as staging:
            _check_target(folder, splits)
            packed = {
                split: _write_split(source, staging, split, shard_bytes, on_item)
                for split, source in splits.items()
            }
            files = [file.name for split in packed.values() for file in split.files]
            try:
                for name in files:
                    fsync(staging / name)
                    os.replace(staging / name, folder / name)
                fsync(folder)
                _commit(folder, splits, packed)
                done = True
            finally:
                known = {file.name for _, own in _read_manifest(folder).values() for file in own}
                for name in set(files) - known:
                    (folder / name).unlink(missing_ok=True)
    finally:
        (folder / ".packed.lock").unlink(missing_ok=True)
        if is_new and not done and not any(folder.iterdir()):
            folder.rmdir()
    return packed


def _check_target(folder: Path, splits: Mapping[str, Source]) -> None:
    known = _read_manifest(folder)
    for split in splits:
        if split in known or (folder / f"{split}{INDEX_SUFFIX}").exists():
            what = f"the folder has packed images of {split} already"
            raise UserError(what, where=folder, fix="Give another folder, or remove them")


def _commit(folder: Path, splits: Mapping[str, Source], packed: dict[str, Packed]) -> None:
    """Makes the files data: before this none is, after it all are."""
    from filelock import FileLock

    with FileLock(folder / ".packed.lock", timeout=60):
        _check_target(folder, splits)  # another process may have been faster
        written = _read_manifest(folder)
        for split, result in packed.items():
            written[split] = list(splits[split].class_names), result.files
        described = {
            split: {"class_names": names, "files": [[f.name, f.size, f.sha256] for f in files]}
            for split, (names, files) in written.items()
        }
        values = {"format": FORMAT, "version": VERSION, "splits": described}
        atomic_write(folder / MANIFEST, (json.dumps(values, indent=1) + "\n").encode())


def _write_split(
    source: Source,
    folder: Path,
    split: str,
    shard_bytes: int,
    on_item: Callable[[int], None] | None,
) -> Packed:
    bad: list[BadImage] = []
    files: list[FileSize] = []
    rows: list[tuple[bytes, bytes, int]] = []  # image, name, label
    header = _HEADER_BYTES + len(json.dumps(list(source.class_names)))
    own, size, num_images = own_names(source), header, 0

    def write() -> None:
        if rows:
            path = folder / f"{split}.arrow"
            _write_arrow(path, rows, source.class_names)
            with path.open("rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            # Named by its contents, so that a file of an unfinished attempt does no harm.
            target = folder / f"{split}-{len(files):05d}-{checksum[:8]}.arrow"
            files.append(FileSize(target.name, path.stat().st_size, checksum))
            os.rename(path, target)
            rows.clear()

    for index in range(len(source)):
        name = source.item_name(index)
        try:
            data = source.read(index)
            EncodedImage(data, name)
        except UserError as error:
            bad.append(BadImage(index, name, error.what))
            continue
        finally:
            if on_item is not None:
                on_item(1)
        row = data, os.fsencode(own[index]), int(source.labels[index])
        length = len(row[0]) + len(row[1]) + _ROW_BYTES
        if size + length > shard_bytes:
            write()
            size = header
        rows.append(row)
        size, num_images = size + length, num_images + 1
    write()
    if not files:
        reason = f"; the first: {bad[0].what}" if bad else ""
        what = f"none of the {len(source)} images can be read{reason}"
        raise UserError(what, where=source.name)
    return Packed(num_images, files, bad)


def _write_arrow(path: Path, rows: list[tuple[bytes, bytes, int]], class_names: list[str]) -> None:
    pa = _pyarrow(path)
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": list(class_names)},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for at in range(0, len(rows), _BATCH_IMAGES):
            images, names, labels = zip(*rows[at : at + _BATCH_IMAGES], strict=True)
            # Names of files need not be UTF-8; a view does not look at them.
            paths = pa.array(names, pa.binary()).view(pa.string())
            parts = [pa.array(images, pa.binary()), paths]
            column = pa.StructArray.from_arrays(parts, fields=list(image))
            writer.write_batch(pa.record_batch([column, pa.array(labels)], schema=schema))


def _matches(spec: SourceSpec) -> bool:
    return is_packed(spec.path) or any(spec.path.glob(".packing.*"))


KIND = Kind("packed data", _matches, open_packed)
