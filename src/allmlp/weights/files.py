"""A weights file of any container -> named tensors; nothing that is read runs code.

What a file is, its first bytes say and not its name:
    safetensors   ours, timm's and the hub's
    npz           Google's; see npz.py
    torch         .pth, .pt and .bin: a pickle, of which only tensors and plain values are taken
"""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from allmlp.errors import UserError
from allmlp.weights.npz import DAMAGE, damaged, read_npz

COPY_AGAIN = "Copy or download it again"
# Under these names training scripts keep the tensors beside their optimiser and settings.
CONTAINERS = ("state_dict", "model", "model_state_dict")
# What wrappers put before the names: data parallelism, compilation, trainers; Flax's trees.
PREFIXES = ("module.", "_orig_mod.", "model.", "params/", "opt/target/", "target/")


@dataclass(frozen=True)
class WeightsFile:
    """What a file holds.

    Attributes:
        path: of the file.
        container: "safetensors", "npz" or "torch".
        tensors: by the file's own names, wrappers' prefixes taken off.
        metadata: text that the file carries, by name.
    """

    path: Path
    container: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_weights(path: Path) -> WeightsFile:
    """Returns the tensors of a safetensors, .npz or torch file.

    Raises:
        UserError: it is none of these, damaged, empty, claims more than it has, or would run code.
    """
    container = container_of(path)
    metadata: dict[str, str] = {}
    if container == "safetensors":
        tensors, metadata = _read_safetensors(path)
    elif container == "npz":
        tensors = read_npz(path)
    else:
        tensors = _read_torch(path)
    tensors = _without_prefixes(tensors)
    if not tensors:
        raise UserError("the file holds no tensors", where=path)
    return WeightsFile(path, container, tensors, metadata)


def container_of(path: Path) -> str:
    """Returns "safetensors", "npz" or "torch", by what the file begins with.

    Raises:
        UserError: it begins with something else, or is empty.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=path) from error
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # the readers below want text
        raise UserError("the name is not valid UTF-8", where=path, fix="Rename it") from error
    if not start:
        raise UserError("the file is empty", where=path, fix=COPY_AGAIN)
    if start[:2] == b"PK":
        return _container_of_archive(path)
    if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch"  # a bare pickle, as torch wrote before 1.6
    if start[8:9] == b"{":
        return "safetensors"
    if start.lstrip()[:1] == b"<":
        what = "a web page and not weights: a download that did not give the file"
        raise UserError(what, where=path, fix="Download it again and look at what the page says")
    what = "not a whole safetensors, .npz or .pth file: it begins like none of them"
    raise UserError(what, where=path, fix=COPY_AGAIN)


def _container_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except DAMAGE as error:
        raise damaged(path, error) from error
    names = [info.filename for info in infos]
    if any(name.endswith(".npy") for name in names):
        return "npz"
    if any(name.endswith("constants.pkl") for name in names):
        raise UserError("a TorchScript archive holds a program: refused", where=path)
    if any(name.endswith("data.pkl") for name in names):
        if sum(info.file_size for info in infos) > path.stat().st_size:
            what = "the file is compressed, which torch never does: refused"
            raise UserError(what, where=path, fix="Do not trust where it came from")
        return "torch"
    raise UserError("an archive without weights (.npy or data.pkl)", where=path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, struct.error) as error:
        what = f"not a whole safetensors file: {error}"
        raise UserError(what, where=path, fix=COPY_AGAIN) from error


# What a pickle may name: tensors, their storages, and plain values. torch's restricted reader takes
# more, such as bytearray(N), which is memory for nothing.
_PLAIN = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    "collections defaultdict",
    "argparse Namespace",  # the settings in timm's training checkpoints
    "torch Size",
    "torch device",
    "torch.serialization _get_layout",
    "builtins set",
    "__builtin__ set",
    "builtins dict",
    "__builtin__ dict",
}
_TORCH_TYPE = re.compile(r"torch \w*Storage|torch\.storage \w*Storage|torch \w+\d+")


def _read_torch(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        what = "a torch pickle under the name of a safetensors file: refused"
        raise UserError(what, where=path, fix="Ask its author, or call it what it is (.pth)")
    loaded: Any = None
    try:
        wanted = sorted(_globals(path))
        blocked = [each for each in wanted if each not in _PLAIN and not _TORCH_TYPE.match(each)]
        if not blocked:
            with torch.serialization.safe_globals([argparse.Namespace]):
                loaded = torch.load(
                    path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
                )
    except pickle.UnpicklingError:
        blocked = ["something that torch refuses"]
    except Exception as error:  # whatever a damaged or hostile pickle leads to
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"not a whole .pth file: {first}", where=path, fix=COPY_AGAIN) from error
    if blocked:
        name = blocked[0].replace(" ", ".")[:80]
        what = f"the file is not plain tensors and could run code ({name}): refused"
        raise UserError(what, where=path, fix="Ask its author for a safetensors file")
    tensors = _state_dict(loaded)
    for name, each in tensors.items():
        if each.layout != torch.strided or each.device.type != "cpu":
            raise UserError(f"{name} is not a plain array of numbers", where=path)
    size, claimed = path.stat().st_size, sum(each.nbytes for each in tensors.values())
    if claimed > 2 * size + 2**20:
        what = f"the tensors claim {claimed:,} bytes, the file has {size:,}"
        raise UserError(what, where=path, fix="Do not trust where it came from")
    return tensors


def _globals(path: Path) -> set[str]:
    """Returns what the pickles of a torch file name, as "module name"; nothing is run."""
    found: set[str] = set()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith("data.pkl"):
                    found |= names_in_pickle(io.BytesIO(archive.read(info)))
        return found
    with path.open("rb") as file:  # before torch 1.6: magic number, protocol, system, object, keys
        for _ in range(5):
            found |= names_in_pickle(file)
    return found


_DEEPEST = 50  # values within values: a tuple as deep as its file is long cannot be hashed
_MOST_SHARED = 1000  # values for each operation: tuples of the same tuple twice grow as 2^n
_FILLING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


def names_in_pickle(file: IO[bytes]) -> set[str]:
    """Returns what a pickle names, as "module name"; nothing is run.

    Raises:
        ValueError: it is damaged, or its values are nested too deeply for what will read it.
    """
    found: set[str] = set()
    # For every value on the stack, how deep it is and of how many values; None is a mark.
    stack: list[tuple[int, int] | None] = []
    memo: dict[Any, tuple[int, int] | None] = {}
    for count, (operation, argument, _) in enumerate(pickletools.genops(file), 1):
        name, before = operation.name, operation.stack_before
        if name in ("GLOBAL", "INST"):
            found.add(str(argument))
        elif name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):  # torch writes none
            found.add(name)
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
            depth = max((1 + each for each, _ in inside), default=0)
            if name in _FILLING:
                depth = max(depth, taken[-1][0])
            size = 1 + sum(each for _, each in taken)
            if depth > _DEEPEST or size > _MOST_SHARED * count:
                raise ValueError(f"values within values, more than {_DEEPEST} deep")
            stack += [(depth, size)] * len(operation.stack_after)
    return found


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    """Returns the tensors of what torch.load gave: bare, or under one of `CONTAINERS`."""
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            return {}
        inner = next((loaded[key] for key in CONTAINERS if isinstance(loaded.get(key), dict)), None)
        if inner is None:
            break
        loaded = inner
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes wrappers' prefixes off the names; what stands beside `params/` is optimiser state."""
    for _ in range(3):
        prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        inside = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        is_tree = prefix.endswith("/")
        if not is_tree and len(inside) < len(tensors):
            break
        tensors = inside
    return tensors
