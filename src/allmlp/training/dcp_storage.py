"""torch.distributed.checkpoint (DCP) as a checkpoint needs it: published when whole, read strictly.

DCP's index of the tensors, `.metadata`, is a pickle, which DCP would run. It is read here alone, by
an unpickler that knows a short list of names: a checksum proves that a file is whole and not that
it is harmless.
"""

from __future__ import annotations

import enum
import io
import pickle
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner

from allmlp.errors import UserError
from allmlp.weights.files import check_nesting


class Writer(FileSystemWriter):
    """DCP's writer, into a fresh folder that rank 0 makes and publishes when all is on disk.

    Both happen inside DCP's own steps, so that what goes wrong on rank 0 reaches every rank, and
    no rank is done before the folder is published.

    Args:
        folder: to write to; rank 0 removes it first where it exists.
        publish: is called on rank 0 once every file of every rank lies on disk.
    """

    def __init__(self, folder: Path, publish: Callable[[], None]) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)
        self._folder, self._publish = folder, publish
        self.has_begun = threading.Event()

    def storage_meta(self) -> None:
        self.has_begun.set()  # the first that DCP asks for; paths and random names are left out

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # DCP would make the folder here, on every rank

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch.save hides a full disk behind "unexpected pos", and the way to the other ranks
            # would lose what is behind it.
            if isinstance(error.__context__, OSError):
                raise OSError(*error.__context__.args) from error
            raise

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        for name in {each.storage_data.relative_path for rank in results for each in rank}:
            if not (self._folder / name).exists():
                what = f"process 0 does not see {name}, which another process wrote"
                raise UserError(what, fix="Put the run on a disk that all machines share")
        self._publish()


class Reader(FileSystemReader):
    """DCP's reader, given the index instead of running the file.

    Args:
        folder: of the checkpoint.
        index: from `parse_index`.
    """

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class StrictPlanner(DefaultLoadPlanner):
    """DCP's planner, which by itself casts to other types and leaves out what is not asked for.

    Args:
        folder: of the checkpoint, for messages.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._folder = folder

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        assert metadata is not None
        differences = _differences(state_dict, metadata)
        if differences:
            shown = "; ".join(differences[:4])
            more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
            what = f"the checkpoint is of another model or optimizer: {shown}{more}"
            raise UserError(what, where=self._folder, fix="Resume with the config of that run")
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("free pickles are refused with the index")


def _differences(tensors: dict[str, Tensor], index: Metadata) -> list[str]:
    saved, found = index.state_dict_metadata, []
    for name, tensor in tensors.items():
        entry = saved.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            found.append(f"{name} is not in it")
            continue
        there = _kind(entry.properties.dtype, entry.size)
        here = _kind(tensor.dtype, tensor.shape)
        if there != here:
            found.append(f"{name} is {there} in it and {here} here")
    return found + [f"{name} is only in it" for name in saved if name not in tensors]


def _kind(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


@contextmanager
def without_hint() -> Iterator[None]:
    """Silences DCP's hint that there is no process group, given even where none was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def parse_index(raw: bytes, files: Collection[str], path: Path) -> Metadata:
    """Returns DCP's index of the tensors; nothing that stands in it is run.

    Args:
        raw: the bytes of `.metadata`.
        files: the names of the files that it may refer to.
        path: of the file, for messages.

    Raises:
        UserError: it names what could run code, or is not what DCP writes.
    """
    try:
        check_nesting(io.BytesIO(raw))  # refuses one that is too deep
        index = _Unpickler(io.BytesIO(raw)).load()
        # DCP would unpickle any entry but a tensor freely, and open any file that is named.
        entries = index.state_dict_metadata.items()
        plain = all(type(k) is str and type(v) is TensorStorageMetadata for k, v in entries)
        known = all(each.relative_path in files for each in index.storage_data.values())
    except _NotAllowedError as error:
        what = f"it could run code ({error}): refused"
        raise UserError(what, where=path, fix="Do not trust where it came from") from error
    except Exception as error:  # whatever a damaged or hostile pickle leads to
        raise UserError("it is damaged: not a whole index", where=path) from error
    if type(index) is not Metadata or not plain or not known:
        raise UserError("it holds more than tensors of this checkpoint: refused", where=path)
    return index


class _NotAllowedError(pickle.UnpicklingError):
    """The pickle names something that an index of tensors does not need."""


# All that DCP's index of plain and of sharded tensors names.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"}
    | {str(each)[6:] for each in vars(torch).values() if isinstance(each, torch.dtype)},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("torch.serialization", "_get_layout"):
            return _layout
        if (module_name, global_name) == ("builtins", "getattr"):
            return _encoding
        if global_name not in _ALLOWED.get(module_name, ()):
            raise _NotAllowedError(f"{module_name}.{global_name}"[:80])
        return super().find_class(module_name, global_name)


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise _NotAllowedError(str(name)[:80])
    return torch.strided


def _encoding(owner: Any, name: str) -> Any:
    """Stands for getattr, by which some versions of Python pickle the members of an enum."""
    if not isinstance(owner, enum.EnumMeta):  # of which one is allowed
        raise _NotAllowedError("builtins.getattr")
    return owner[name]
