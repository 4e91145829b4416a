"""Zip and tar files as folders: `photos.zip/cat/1.jpg` is a file in photos.zip.

Nothing is unpacked: the index of an archive is read once per process, and a file is read from its
own place, with a descriptor of its own, so that processes share nothing. Links are passed over.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import stat
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, field

from allmlp.errors import UserError

SUFFIXES = (".zip", ".tar")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_ZIP_HEADER = 30  # bytes before a file's name
_LARGEST = 2**28  # bytes of a file inside
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class Entry:
    """A file or folder in an archive, with the interface of `os.DirEntry` that we use."""

    name: str
    is_inner_folder: bool

    def is_dir(self) -> bool:
        return self.is_inner_folder

    def is_symlink(self) -> bool:
        return False


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a file are; `method` is None in a tar."""

    offset: int  # of a zip's local header, or of a tar's bytes
    stored: int
    size: int
    method: int | None = None
    checksum: int = 0


@dataclass(frozen=True)
class _Archive:
    files: dict[str, _Place] = field(default_factory=dict)
    folders: dict[str, dict[str, bool]] = field(default_factory=lambda: {"": {}})  # name -> is one


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether the path is a zip or tar file, or a file or folder in one."""
    return _divided(os.fspath(path)) is not None


def entries(path: str) -> list[Entry] | None:
    """Returns the contents of a folder in an archive; None if it is not one."""
    archive, inside = _divided(path) or (path, "")
    found = _opened(archive).folders.get(inside)
    return None if found is None else [Entry(name, is_one) for name, is_one in found.items()]


def read(path: str) -> bytes | None:
    """Returns a file in an archive; None if the path is not one.

    Raises:
        UserError: the archive is damaged there, or the file too large.
    """
    archive, inside = _divided(path) or (path, "")
    place = _opened(archive).files.get(inside) if inside else None
    if place is None:
        return None
    if max(place.size, place.stored) > _LARGEST:
        raise UserError(f"the file is larger than {_LARGEST:,} bytes", where=path)
    try:
        with open(archive, "rb") as file:
            start = place.offset
            if place.method is not None:
                file.seek(start)
                header = file.read(_ZIP_HEADER)
                start += len(header) + sum(
                    int.from_bytes(header[at : at + 2], "little") for at in (26, 28)
                )
            file.seek(start)
            data = file.read(place.stored)
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=path) from error
    try:
        if place.method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, place.size)
    except zlib.error:
        data = b""
    is_whole = len(data) == place.size
    if not is_whole or (place.method is not None and zlib.crc32(data) != place.checksum):
        raise UserError(
            "the file is damaged in its archive", where=path, fix="Fetch the archive again"
        )
    return data


def _divided(path: str) -> tuple[str, str] | None:
    """The archive's path and the path inside it; None if no part of the path is an archive."""
    for found in re.finditer(r"(?i)\.(zip|tar|t[bgx]z2?|tar\.\w+)(?=[/\\]|$)", path):
        archive = path[: found.end()]
        if os.path.isfile(archive):
            inside = os.path.normpath(path[found.end() + 1 :] or ".").replace(os.sep, "/")
            return archive, "" if inside == "." else inside
    return None


def _opened(path: str) -> _Archive:
    if path.lower().endswith(_COMPRESSED):
        what = "a compressed tar file cannot be read in place"
        raise UserError(what, where=path, fix=f"Unpack it (tar xf {path}), or use .tar or .zip")
    found = os.stat(path)
    return _index(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _index(path: str, size: int, changed: int) -> _Archive:
    archive = _Archive()
    try:
        if path.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as file:
                for member in file.infolist():
                    _add_zipped(archive, member, path)
        else:
            with tarfile.open(path, "r:") as file:
                for member in file:
                    if member.isreg() and not member.issparse():
                        place = _Place(member.offset_data, member.size, member.size)
                        _add(archive, member.name, place, path)
    except (zipfile.BadZipFile, tarfile.TarError, OSError, NotImplementedError) as error:
        what = f"not a complete archive: {str(error)[:100] or type(error).__name__}"
        raise UserError(what, where=path, fix="Fetch or write it again") from error
    return archive


def _add_zipped(archive: _Archive, member: zipfile.ZipInfo, path: str) -> None:
    if member.is_dir() or stat.S_ISLNK(member.external_attr >> 16):
        return
    if member.flag_bits & 1 or member.compress_type not in _METHODS:
        kind = "encrypted" if member.flag_bits & 1 else f"of method {member.compress_type}"
        what = f"a file in it is {kind}: {member.filename!r}"
        raise UserError(what, where=path, fix="Write the archive with a plain zip, or unpack it")
    name = member.filename.replace("\\", "/")
    if not member.flag_bits & 0x800:  # said to be in the DOS code page; macOS writes UTF-8
        with contextlib.suppress(ValueError):
            name = name.encode("cp437").decode()
    size = member.file_size
    place = member.header_offset, member.compress_size, size, member.compress_type, member.CRC
    _add(archive, name, _Place(*place), path)


def _add(archive: _Archive, name: str, place: _Place, path: str) -> None:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or name[:1] == "/" or "\0" in name or not parts:
        what = f"a file in it is named outside of it: {name!r}"
        raise UserError(what, where=path, fix="Write the archive again, from inside the folder")
    archive.files["/".join(parts)] = place
    for at, part in enumerate(parts):
        is_folder = at + 1 < len(parts)
        archive.folders.setdefault("/".join(parts[:at]), {})[part] = is_folder
