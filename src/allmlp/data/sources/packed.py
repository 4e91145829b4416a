"""Packed data: many images in few files, equally fast in random and in sequential order.

Arrow files in the Hugging Face layout, and packed.json that lists them, written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from allmlp.data.classes import RawLabels
from allmlp.data.fingerprint import own_names
from allmlp.data.image import EncodedImage
from allmlp.data.source import (
    FOLD,
    GROUP,
    BadImage,
    ByteRanges,
    PackedBytes,
    PackedStrings,
    Source,
    check_one_label,
    values_of,
)
from allmlp.data.source_spec import SPLITS, SourceSpec
from allmlp.data.sources.columns import Kind, Rows
from allmlp.errors import UserError, between
from allmlp.io import (
    atomic_write,
    check_output_folder,
    fsync,
    parse_json,
    sha256_of,
    staging_folder,
)
from allmlp.names import import_extra, is_format

MANIFEST = "packed.json"
FORMAT, VERSION = "allmlp packed data", 1
SHARD_BYTES = 256 * 10**6
_BATCH_IMAGES = 100  # per record batch, which has 32-bit offsets
_ROW_BYTES, _HEADER_BYTES = 64, 4096  # maximum overhead per image and per file
_FIX = "Pack or copy the folder again"


class PackedFile(NamedTuple):
    name: str
    size: int  # bytes
    sha256: str


def is_packed(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def open_packed(spec: SourceSpec, labels: bool) -> Iterator[Rows]:
    if not is_packed(spec.path):
        what = "mixer data pack was killed before the data was complete"
        fix = "Run the same mixer data pack again: it starts over"
        raise UserError(what, where=spec.path, fix=fix)
    manifest = _read_manifest(spec.path)
    for split in (split for split in SPLITS if split in manifest):
        class_names, files = manifest[split]
        images, codes = _index(spec.path, files)
        raw = RawLabels(codes, class_names, are_classes=True)
        yield Rows(images, {"label": lambda raw=raw: raw}, split)


def _check_size(folder: Path, file: PackedFile) -> None:
    path = folder / file.name
    size = path.stat().st_size
    if size != file.size:
        what = f"the file has {size:,} bytes instead of {file.size:,}"
        raise UserError(what, where=path, fix=_FIX)


def verify(folder: Path) -> list[str]:
    """Verifies the checksums of packed data; returns the problems, one line each."""
    problems: list[str] = []
    try:
        for file in (file for _, files in _read_manifest(folder).values() for file in files):
            _check_size(folder, file)
            if file.sha256 != sha256_of(folder / file.name):
                what = "the file has another checksum than it was written with"
                problems.append(f"{folder / file.name}: {what}")
    except UserError as error:
        problems.append(f"{error.where}: {error.what}")
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}")
    return problems


def _read_manifest(folder: Path) -> dict[str, tuple[list[str], list[PackedFile]]]:
    """Returns the class names and files of each split; empty without a manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        values = parse_json(path.read_bytes())
        if not is_format(values["format"], FORMAT) or values["version"] != VERSION:
            raise ValueError(f"it is not {FORMAT}, version {VERSION}")
        found = {}
        for split, described in values["splits"].items():
            files = [PackedFile(*file) for file in described["files"]]
            if any(Path(file.name).name != file.name for file in files):
                raise ValueError("a file outside the folder")
            found[split] = list(map(str, described["class_names"])), files
        return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"the list of the packed files is damaged: {error}"
        raise UserError(what, where=path, fix=_FIX) from error


def _index(folder: Path, files: list[PackedFile]) -> tuple[ByteRanges, np.ndarray]:
    parts: list[tuple[np.ndarray, ...]] = []
    for number, file in enumerate(files):
        _check_size(folder, file)  # a truncated file must not be mapped
        path = folder / file.name
        try:
            parts += [(np.full(len(part[0]), number, np.int32), *part) for part in _batches(path)]
        except UserError:
            raise
        except (OSError, LookupError, ValueError) as error:  # pyarrow raises ValueErrors
            raise UserError(f"the file is damaged: {error}", where=path, fix=_FIX) from error
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    numbers, offsets, sizes, labels, letters, lengths = columns
    names = PackedStrings(PackedBytes((letters, np.concatenate([[0], np.cumsum(lengths)]))))
    paths = [str(folder / file.name) for file in files]
    return ByteRanges(paths, numbers, offsets, sizes, names), labels


def _batches(path: Path) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields the images' offsets, lengths and labels, and their names and name lengths."""

    def buffer(column: Any) -> tuple[np.ndarray, Any]:
        """The offsets of a column of bytes or text, and its buffer."""
        _, offsets, data = column.buffers()
        return np.frombuffer(offsets, np.int32)[: len(column) + 1].astype(np.int64), data

    pa = _pyarrow(path)
    with pa.memory_map(str(path)) as file:
        whole = file.read_buffer()
        for batch in pa.ipc.open_stream(whole):
            image = batch.column("image")
            ends, data = buffer(image.field("bytes"))
            name_ends, names = buffer(image.field("path"))
            name_bytes = np.frombuffer(names, np.uint8)[name_ends[0] : name_ends[-1]].copy()
            offsets = data.address - whole.address + ends[:-1]
            labels = batch.column("label").to_numpy().copy()
            yield offsets, np.diff(ends), labels, name_bytes, np.diff(name_ends)


def _pyarrow(where: object) -> Any:
    return import_extra("pyarrow", "data", "packed data needs pyarrow", where)


@dataclass
class Packed:
    num_images: int = 0
    files: list[PackedFile] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)


def pack_splits(
    splits: Mapping[str, Source],
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_item: Callable[[int], object] = lambda _: None,
) -> dict[str, Packed]:
    """Packs splits into a folder, all or nothing and deterministic; images keep their bytes."""
    from filelock import FileLock

    check_one_label(splits.values(), "packed data")
    for source in splits.values():
        for role in (GROUP, FOLD):
            if values_of(source, role) is not None:
                what = f"packed data has no place for the {role} of each image"
                fix = f"Train on the data itself, or leave the column of {role}s out"
                raise UserError(what, where=source.name, fix=fix, code="groups")
    between("shard_bytes", shard_bytes, 1, 2**31 - 1)  # 32-bit offsets
    _pyarrow(folder)
    check_output_folder(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    try:
        with staging_folder(folder / "packing") as staging:
            _check_free(folder, splits)
            packed = {
                split: _write_split(source, staging, split, shard_bytes, on_item)
                for split, source in splits.items()
            }
            names = [file.name for split in packed.values() for file in split.files]
            for name in names:
                fsync(staging / name)
                os.replace(staging / name, folder / name)
            fsync(folder)
            with FileLock(folder / ".packed.lock", timeout=60):
                written = _check_free(folder, splits)
                for split, source in splits.items():
                    written[split] = list(source.class_names), packed[split].files
                described = {
                    split: {"class_names": names, "files": files}
                    for split, (names, files) in written.items()
                }
                manifest = {"format": FORMAT, "version": VERSION, "splits": described}
                # Commits all files at once.
                atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    finally:
        known = {file.name for _, files in _read_manifest(folder).values() for file in files}
        for name in set(names) - known:  # after a failure
            (folder / name).unlink(missing_ok=True)
        (folder / ".packed.lock").unlink(missing_ok=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
    return packed


def _check_free(
    folder: Path, splits: Iterable[str]
) -> dict[str, tuple[list[str], list[PackedFile]]]:
    written = _read_manifest(folder)
    for split in splits:
        if split in written:
            what = f"the folder has packed images of {split} already"
            fix = "Give another folder, or remove them"
            raise UserError(what, where=folder, fix=fix, code="exists")
    return written


def _write_split(
    source: Source, folder: Path, split: str, shard_bytes: int, on_item: Callable[[int], object]
) -> Packed:
    packed = Packed()
    rows: list[tuple[bytes, bytes, int]] = []  # image, name, label
    header = _HEADER_BYTES + len(json.dumps(list(source.class_names)))
    own, size = own_names(source), header

    def write() -> None:
        path = folder / f"{split}.arrow"
        _write_arrow(path, rows, source.class_names)
        checksum = sha256_of(path)
        # Named by content, so that files from unfinished attempts do no harm.
        target = folder / f"{split}-{len(packed.files):05d}-{checksum[:8]}.arrow"
        packed.files.append(PackedFile(target.name, path.stat().st_size, checksum))
        os.rename(path, target)
        packed.num_images += len(rows)
        rows.clear()

    for index in range(len(source)):
        name = source.item_name(index)
        try:
            data = source.read(index)
            EncodedImage(data, name)
        except UserError as error:
            packed.bad.append(BadImage(index, name, error.what))
            continue
        finally:
            on_item(1)
        row = data, os.fsencode(own[index]), int(source.labels[index])
        length = len(row[0]) + len(row[1]) + _ROW_BYTES
        if rows and size + length > shard_bytes:
            write()
            size = header
        rows.append(row)
        size += length
    if not rows:
        reason = f"; the first: {packed.bad[0].what}" if packed.bad else ""
        raise UserError(f"none of the {len(source)} images can be read{reason}", where=source.name)
    write()
    return packed


def _write_arrow(path: Path, rows: list[tuple[bytes, bytes, int]], class_names: list[str]) -> None:
    pa = _pyarrow(path)
    label = {"_type": "ClassLabel", "names": list(class_names)}
    features = {"image": {"_type": "Image"}, "label": label}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for at in range(0, len(rows), _BATCH_IMAGES):
            images, names, labels = zip(*rows[at : at + _BATCH_IMAGES], strict=True)
            # File names need not be UTF-8; a view does not validate them.
            paths = pa.array(names, pa.binary()).view(pa.string())
            parts = [pa.array(images, pa.binary()), paths]
            column = pa.StructArray.from_arrays(parts, fields=list(image))
            writer.write_batch(pa.record_batch([column, pa.array(labels)], schema=schema))


KIND = Kind(
    "packed data",
    lambda spec: is_packed(spec.path) or any(spec.path.glob(".packing.*")),
    open_packed,
)
