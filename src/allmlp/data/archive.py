"""Zip and tar files as folders: `photos.zip/cat/1.jpg` is a file in photos.zip.

The index is read once per process; a file is read from its own place with its own descriptor.
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
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from allmlp.errors import UserError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_LARGEST = 2**28  # bytes of a file inside


class _Place(NamedTuple):
    """Where the bytes of a file are; `method` is None in a tar."""

    offset: int  # of a zip's local header, or of a tar's bytes
    stored: int
    size: int
    method: int | None = None
    checksum: int = 0


# Files, and for every folder the names in it with whether each is a folder.
_Index = tuple[dict[str, _Place], dict[str, dict[str, bool]]]


def is_archive(path: str | os.PathLike[str]) -> bool:
    return _divided(os.fspath(path))[0] != ""


def entries(path: str) -> dict[str, bool] | None:
    """Returns the names in a folder in an archive, with whether each is a folder, or None."""
    archive, inside = _divided(path)
    return _opened(archive)[1].get(inside) if archive else None


def read(path: str) -> bytes | None:
    archive, inside = _divided(path)
    place = _opened(archive)[0].get(inside) if archive else None
    if place is None:
        return None
    if max(place.size, place.stored) > _LARGEST:
        raise UserError(f"the file is larger than {_LARGEST:,} bytes", where=path)
    try:
        with open(archive, "rb") as file:
            file.seek(place.offset)
            if place.method is not None:
                header = file.read(30)  # it ends with the lengths of the name and of extra fields
                lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
                file.seek(sum(lengths), os.SEEK_CUR)
            data = file.read(place.stored)
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=path) from error
    with contextlib.suppress(zlib.error):  # then the checksum is wrong
        if place.method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, place.size)
    is_whole = len(data) == place.size
    if not is_whole or (place.method is not None and zlib.crc32(data) != place.checksum):
        fix = "Fetch the archive again"
        raise UserError("the file is damaged in its archive", where=path, fix=fix)
    return data


def _divided(path: str) -> tuple[str, str]:
    """The archive's path, empty if no part of the path is an archive, and the path inside it."""
    for found in re.finditer(r"(?i)\.(zip|tar|t[bgx]z2?|tar\.\w+)(?=[/\\]|$)", path):
        archive = path[: found.end()]
        if os.path.isfile(archive):
            inside = os.path.normpath(path[found.end() + 1 :] or ".").replace(os.sep, "/")
            return archive, "" if inside == "." else inside
    return "", ""


def _opened(path: str) -> _Index:
    if path.lower().endswith(_COMPRESSED):
        what = "a compressed tar file cannot be read in place"
        raise UserError(what, where=path, fix=f"Unpack it (tar xf {path}), or use .tar or .zip")
    found = os.stat(path)
    return _index(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _index(path: str, size: int, changed: int) -> _Index:
    files: dict[str, _Place] = {}
    folders: dict[str, dict[str, bool]] = {"": {}}
    try:
        members = [*(_zipped if path.lower().endswith(".zip") else _tarred)(path)]
    except (zipfile.BadZipFile, tarfile.TarError, OSError, NotImplementedError) as error:
        what = f"not a complete archive: {str(error)[:100] or type(error).__name__}"
        raise UserError(what, where=path, fix="Fetch or write it again") from error
    for name, place in members:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or name[:1] == "/" or "\0" in name or not parts:
            what = f"a file in it is named outside of it: {name!r}"
            raise UserError(what, where=path, fix="Write the archive again, from inside the folder")
        files["/".join(parts)] = place
        for at, part in enumerate(parts):
            folders.setdefault("/".join(parts[:at]), {})[part] = at + 1 < len(parts)
    return files, folders


def _tarred(path: str) -> Iterator[tuple[str, _Place]]:
    for member in tar_members(path):
        yield member.name, _Place(member.offset_data, member.size, member.size)


def tar_members(path: str) -> Iterator[tarfile.TarInfo]:
    """Yields the files in a tar; unlike tarfile, raises TarError if it is damaged or cut short."""
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            cast(Any, tar).members = []  # tarfile would keep a list of all members
            if member.isreg() and not member.issparse():
                yield member
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"neither an end nor a member at byte {tar.offset}")


def _zipped(path: str) -> Iterator[tuple[str, _Place]]:
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            if member.is_dir() or stat.S_ISLNK(member.external_attr >> 16):
                continue
            method, is_encrypted = member.compress_type, member.flag_bits & 1
            if is_encrypted or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                kind = "encrypted" if is_encrypted else f"of method {method}"
                fix = "Write the archive with a plain zip, or unpack it"
                raise UserError(f"a file in it is {kind}: {member.filename!r}", where=path, fix=fix)
            name = member.filename.replace("\\", "/")
            if not member.flag_bits & 0x800:  # said to be in the DOS code page; macOS writes UTF-8
                with contextlib.suppress(ValueError):
                    name = name.encode("cp437").decode()
            size = member.compress_size, member.file_size
            yield name, _Place(member.header_offset, *size, method, member.CRC)
