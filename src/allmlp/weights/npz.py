"""NumPy's .npz archives, read without trust: no pickle, nothing unpacked before its size is known.

A member's size stands in the archive's directory and again, as a shape, in the member's own header;
both are read and compared first, so that a small file that claims gigabytes is refused at once.
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from allmlp.errors import UserError

MAX_EXPANSION = 20  # times the size of the file; trained weights hardly compress
MAX_MEMBERS = 100_000
ALWAYS_ALLOWED = 64 * 2**20  # bytes; small files of zeros may compress as they like
# What Python's zipfile raises for a damaged archive.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    UnicodeError,
    LookupError,
    OverflowError,
)


@dataclass(frozen=True)
class Member:
    """An array in an archive, before it is read.

    Attributes:
        name: without ".npy".
        shape: of the array.
        dtype: of the array; "V2" is how NumPy stores bfloat16.
        fortran_order: whether the first axis runs fastest.
        offset: bytes before the data.
        info: where it lies in the archive.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int
    info: zipfile.ZipInfo


def list_members(path: Path) -> list[Member]:
    """Returns what is in an archive; reads headers only.

    Raises:
        UserError: it is damaged, claims too much, or holds something else than arrays of numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            _check_sizes(path, infos)
            return [_member(archive, info, path) for info in infos]
    except DAMAGE as error:
        raise damaged(path, error) from error


def read_npz(path: Path) -> dict[str, Tensor]:
    """Returns every array of an archive as a tensor; bfloat16 stays bfloat16.

    Raises:
        UserError: as `list_members`, or a member's checksum is wrong.
    """
    members = list_members(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return {member.name: _read(archive, member) for member in members}
    except DAMAGE as error:
        raise damaged(path, error) from error


def fingerprint(path: Path) -> str:
    """Returns a checksum of an archive's content, from the checksums in its directory."""
    with zipfile.ZipFile(path) as archive:
        sums = "".join(f"{info.filename} {info.CRC}\n" for info in archive.infolist())
    return f"crc32:{zlib.crc32(sums.encode()):08x}"


def damaged(path: Path, error: object) -> UserError:
    """Returns the error for an archive that cannot be read to its end."""
    kind = path.suffix or "archive"
    return UserError(
        f"not a whole {kind} file: {error}", where=path, fix="Copy or download it again"
    )


def _check_sizes(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    size, claimed = path.stat().st_size, sum(info.file_size for info in infos)
    if claimed > max(ALWAYS_ALLOWED, MAX_EXPANSION * size):
        what = f"the file of {size:,} bytes would unpack to {claimed:,}; weights do not compress so"
        raise UserError(what, where=path, fix="Do not trust where it came from")
    if len(infos) > MAX_MEMBERS:
        raise UserError(f"the archive holds {len(infos):,} arrays, no model does", where=path)
    name, times = Counter(info.filename for info in infos).most_common(1)[0] if infos else ("", 1)
    if times > 1:
        raise UserError(f"the archive holds {name!r} more than once", where=path)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Member:
    where = f"{path}: {info.filename}"
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
            shape, fortran_order, dtype = _read_header(file, version)
            offset = file.tell()
        except DAMAGE:
            raise
        except Exception as error:  # NumPy parses the header as Python: many kinds of errors
            what = f"not an array: {str(error).splitlines()[0][:200] if str(error) else error!r}"
            raise UserError(what, where=where) from error
    if dtype.hasobject:
        raise UserError("holds Python objects, which could run code: refused", where=where)
    is_number = dtype.kind in "fiu" and dtype.itemsize <= 8
    if not (is_number or dtype == np.dtype("V2")):
        raise UserError(f"an array of {dtype} where numbers are expected", where=where)
    if len(shape) > 8 or not all(type(side) is int and 0 <= side < 2**48 for side in shape):
        raise UserError(
            "an array of impossible shape: it claims more than there can be", where=where
        )
    count = 1
    for side in shape:  # Python's integers: no overflow
        count *= side
    if offset + count * dtype.itemsize != info.file_size:
        claimed = offset + count * dtype.itemsize
        what = f"the array claims {claimed:,} bytes, the archive has {info.file_size:,}"
        raise UserError(what, where=where, fix="Copy or download it again")
    name = info.filename.removesuffix(".npy")
    return Member(name, shape, dtype, fortran_order, offset, info)


def _read_header(
    file: IO[bytes], version: tuple[int, int]
) -> tuple[tuple[int, ...], bool, np.dtype]:
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _read(archive: zipfile.ZipFile, member: Member) -> Tensor:
    data = bytearray(archive.read(member.info))  # the archive's checksum is tested here
    order = "F" if member.fortran_order else "C"
    array = np.ndarray(member.shape, member.dtype, data, member.offset, order=order)
    if member.dtype == np.dtype("V2"):
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    native = member.dtype.newbyteorder("=")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=native))
