"""Reads a weights file of any format into named tensors, without running any code.

The format is detected from the first bytes, not from the name.
"""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from allmlp.errors import UserError

# Keys under which training scripts store the tensors, next to the optimizer and settings.
CONTAINERS = ("state_dict", "model", "model_state_dict")
# Name prefixes added by wrappers: data parallelism, compilation, trainers; and Flax's trees.
PREFIXES = ("module.", "_orig_mod.", "model.", "params/", "opt/target/", "target/")
_EXPANSION, _ALWAYS = 20, 64 * 2**20  # an archive may unpack to 20 times its size, or 64 MiB


@dataclass(frozen=True)
class WeightsFile:
    """Contents of a file: tensors by its own names, without wrapper prefixes, and text entries."""

    path: Path
    container: str  # "safetensors", "npz" or "torch"
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    chosen: str = ""  # "state_dict, not state_dict_ema", if there is a choice


def read_weights(path: Path) -> WeightsFile:
    """Returns a file's tensors; UserError if it is damaged, malicious or something else."""
    container = _container(path)
    metadata: dict[str, str] = {}
    chosen = ""
    try:
        if container == "safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        else:
            tensors, chosen = (_read_npz(path), "") if container == "npz" else _read_torch(path)
    except UserError:
        raise
    except Exception as error:  # damaged or malicious files can raise anything
        raise _damaged(path, container, error) from error
    tensors = _without_prefixes(tensors)
    if not tensors:
        raise UserError("the file holds no tensors", where=path)
    return WeightsFile(path, container, tensors, metadata, chosen)


def _damaged(path: Path, container: str, error: object) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    what = f"not a whole {'.pth' if container == 'torch' else container} file: {reason}"
    return UserError(what, where=path, fix="Copy or download it again", code="damaged")


def _hostile(path: Path, what: str, fix: str = "Do not trust where it came from") -> UserError:
    return UserError(f"{what}: not loaded", where=path, fix=fix, code="unsafe")


def _container(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=path) from error
    if start[:2] == b"PK":
        return _container_of_archive(path)
    if re.match(rb"\x80[\x02-\x05]", start):
        return "torch"  # a bare pickle, as written by torch before 1.6
    if start[8:9] == b"{":
        return "safetensors"
    what = "the file is empty" if not start else "neither safetensors, .npz nor .pth by its start"
    if start.lstrip()[:1] == b"<":
        what = "a web page instead of weights: the download did not return the file"
    raise UserError(what, where=path, fix="Copy or download it again", code="damaged")


def _container_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:  # zipfile can raise anything for a damaged archive
        raise _damaged(path, "archive", error) from error
    names, size = [info.filename for info in infos], path.stat().st_size
    claimed = sum(info.file_size for info in infos)
    if len(set(names)) < len(names):
        raise _hostile(path, "the archive holds a name more than once")
    if any(name.endswith(".npy") for name in names):
        if claimed > max(_ALWAYS, _EXPANSION * size):
            raise _hostile(path, f"{size:,} bytes that would unpack to {claimed:,}")
        return "npz"
    if any(name.endswith("constants.pkl") for name in names):
        raise _hostile(path, "a TorchScript archive holds a program")
    if not any(name.endswith("data.pkl") for name in names):
        raise UserError("an archive without weights (.npy or data.pkl)", where=path)
    if claimed > size:
        raise _hostile(path, "the file is compressed, which torch never does")
    return "torch"


def _read_npz(path: Path) -> dict[str, Tensor]:
    tensors = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            data = io.BytesIO(archive.read(name))  # whole, which verifies the archive's checksum
            array = np.lib.format.read_array(data, allow_pickle=False)
            tensors[name.removesuffix(".npy")] = _tensor(array, name)
    return tensors


def _tensor(array: np.ndarray, name: str) -> Tensor:
    if array.dtype == np.dtype("V2"):  # NumPy's way of storing bfloat16
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise ValueError(f"{name} is an array of {array.dtype}, numbers are expected")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def fingerprint(path: Path) -> str:
    """Returns a checksum of an archive's contents, from the checksums in its directory."""
    with zipfile.ZipFile(path) as archive:
        sums = "".join(f"{info.filename} {info.CRC}\n" for info in archive.infolist())
    return f"crc32:{zlib.crc32(sums.encode()):08x}"


def _read_torch(path: Path) -> tuple[dict[str, Tensor], str]:
    if path.suffix == ".safetensors":
        what = "a torch pickle under the name of a safetensors file"
        raise _hostile(path, what, "Ask its author, or call it what it is (.pth)")
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    check_nesting(io.BytesIO(archive.read(name)))
    else:
        with path.open("rb") as file:
            for _ in range(5):  # before torch 1.6: magic, protocol, system, object, keys
                check_nesting(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # used in timm's checkpoints
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|Unsupported operand (\d+)", str(error))
        if found is None:
            raise
        what = f"the file is not plain tensors and could run code ({found[1] or found[2]:.80})"
        raise _hostile(path, what, "Ask its author for a safetensors file") from error
    chosen = ""
    for _ in range(3):  # the tensors are bare, or under one of `CONTAINERS`
        entries = loaded.items() if isinstance(loaded, Mapping) else ()
        parts = [key for key, value in entries if isinstance(value, dict)]
        inner = [key for key in CONTAINERS if key in parts]
        if inner:
            averages = [key for key in parts if "ema" in str(key).split("_")]
            chosen = f"{inner[0]}, not {averages[0]}" if averages else chosen
            loaded = loaded[inner[0]]
    values = loaded if isinstance(loaded, Mapping) else {}
    tensors = {str(key): value for key, value in values.items() if isinstance(value, Tensor)}
    tensors.pop("n_averaged", None)  # of torch's AveragedModel, beside "module."
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{name} is not a plain array of numbers", where=path)
    size, claimed = path.stat().st_size, sum(tensor.nbytes for tensor in tensors.values())
    if claimed > 2 * size + 2**20:
        raise _hostile(path, f"the tensors claim {claimed:,} bytes, the file has {size:,}")
    return tensors, chosen


_DEEPEST = 50  # levels: hashing a tuple nested as deeply as its file is long kills the process
_MOST_SHARED = 1000  # values per operation: nesting a tuple in itself twice grows as 2^n
_FILLING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


def check_nesting(file: IO[bytes]) -> None:
    """Walks a pickle without building its values; ValueError if they are nested too deeply."""
    # Depth and number of values of every entry on the stack; None is a mark.
    stack: list[tuple[int, int] | None] = []
    memo: dict[Any, tuple[int, int] | None] = {}
    for count, (operation, argument, _) in enumerate(pickletools.genops(file), 1):
        name, before = operation.name, operation.stack_before
        if name == "MARK":
            stack.append(None)
        elif "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            taken: list[tuple[int, int]] = []
            if pickletools.markobject in before:
                while (value := stack.pop()) is not None:
                    taken.append(value)
                before = before[: before.index(pickletools.markobject)]
            taken += [value for _ in before if (value := stack.pop()) is not None]
            inside = taken[:-1] if name in _FILLING else taken
            depth = max((1 + depth for depth, _ in inside), default=0)
            if name in _FILLING:
                depth = max(depth, taken[-1][0])
            size = 1 + sum(size for _, size in taken)
            if depth > _DEEPEST or size > _MOST_SHARED * count:
                raise ValueError(f"values within values, more than {_DEEPEST} deep")
            stack += [(depth, size)] * len(operation.stack_after)


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strips wrapper prefixes from the names; whatever is not in `params/` is optimizer state."""
    for _ in range(3):
        prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in tensors)), "")
        inside = {name: value for name, value in tensors.items() if name.startswith(prefix)}
        if prefix.endswith("/") or len(inside) == len(tensors):
            tensors = {name.removeprefix(prefix): value for name, value in inside.items()}
    return tensors
