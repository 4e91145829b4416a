"""Full checkpoints of a run: written in the background, verified, renamed into place, pruned.

checkpoints/
  step-00012000/            state.safetensors, and manifest.json: everything else, with checksums
  .step-00013000.partial/   being written; the manifest is added once the tensors are on disk
  .step-00011000.removed/   being removed

A folder under its final name is complete: a rename is the last step of a save and the first of a
removal. Only the main process reads, writes, holds a copy and computes checksums. A sharded state
is gathered and distributed tensor by tensor, so checkpoints do not depend on the number of
processes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from allmlp.errors import UserError, some_of
from allmlp.io import fsync, parse_json, sha256_of
from allmlp.names import NAME
from allmlp.runtime.world import World, fill_from_rank0, full_tensor, saving

STATE, MANIFEST = "state.safetensors", "manifest.json"
FORMAT = 2
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, and the contents of its manifest except the checksums."""

    path: Path
    step: int
    values: dict[str, Any]
    is_best: bool = False


@dataclass(eq=False)
class Checkpoints:
    """The checkpoints of a run; all processes, which share the folder, call `save`, `newest`,
    `peek` and `load` together. Kept are the `keep` newest and the newest best one."""

    folder: Path
    keep: int = 2
    world: World = field(default_factory=World)
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        # A single thread; the interpreter waits for it at exit, so a save in progress completes.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._damaged: set[str] = set()

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor] | None,
        values: dict[str, Any],
        *,
        is_best: bool = False,
        first: Callable[[], object] | None = None,
    ) -> None:
        """Copies the state to CPU memory; `first` and writing the copy, unless its step is there
        already, go on in the background. Raises the error of the save before."""
        self.wait_on_all()
        values, copies = json.loads(json.dumps(values)), {}
        for name, tensor in (tensors or {}).items():
            gathered = full_tensor(tensor.detach())  # on every process, one tensor at a time
            if self.world.is_main:
                copies[name] = gathered.to("cpu", copy=True)

        def write() -> None:
            with saving:
                if first is not None:
                    first()
                if tensors is not None:
                    self._write(step, copies, values, is_best)

        if self.world.is_main:
            self._pending = self._thread.submit(write)

    def wait_on_all(self) -> None:
        """Waits on all processes until the main one has nothing left to write; raises its error."""
        self.world.broadcast_from_rank0(self.wait)

    def wait(self) -> None:
        """Waits until the save in progress is on disk under its final name; raises its error."""
        if self._pending is not None:
            try:
                self._pending.result()
            finally:
                if self._pending.done():  # not when interrupted while waiting
                    self._pending = None

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def newest(self) -> Checkpoint | None:
        """Returns the newest whole checkpoint; names damaged ones, removes what kills left."""
        return self.world.broadcast_from_rank0(self._newest)

    def peek(self) -> Checkpoint | None:
        """Returns the newest checkpoint without its checksum verified; changes nothing."""
        return self.world.broadcast_from_rank0(lambda: next(self._readable(), None))

    def load(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
        """Fills the tensors in place; names, shapes and dtypes must match the checkpoint."""
        path, world = checkpoint.path / STATE, self.world
        world.broadcast_from_rank0(lambda: _check_same_tensors(path, tensors))
        with _opened(path) if world.is_main else contextlib.nullcontext() as file:
            for name, tensor in tensors.items():
                fill_from_rank0(tensor, None if file is None else file.get_tensor(name), world)

    # Everything below runs on the main process only.

    def _write(
        self, step: int, tensors: dict[str, Tensor], values: dict[str, Any], is_best: bool
    ) -> None:
        target = self.folder / f"step-{step:08d}"
        partial = target.with_name(f".{target.name}.partial")
        try:
            if target.exists():
                try:
                    verify(target)
                    return
                except (UserError, OSError):
                    self._damaged.add(target.name)
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            size, digest = write_tensors(partial / STATE, tensors)
            content = {"format": FORMAT, NAME: version(NAME), "step": step, "is_best": is_best}
            content |= {"values": values, "size": size, "sha256": digest}
            write_manifest(partial, content)
            if target.exists():
                _remove(target)
            partial.rename(target)
            self._damaged.discard(target.name)
            fsync(self.folder)
            fsync(self.folder.parent)
        except OSError as error:
            place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
            free = shutil.disk_usage(place).free  # before leftovers of the write are removed
            shutil.rmtree(partial, ignore_errors=True)
            what = f"the checkpoint cannot be written: {error.strerror or error}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                needed = sum(tensor.nbytes for tensor in tensors.values())
                what = f"the disk is full: the checkpoint needs {needed:,} bytes, {free:,} are free"
            fix = "Fix that and resume the run; the previous checkpoint is complete"
            raise UserError(what, where=target, fix=fix, code="checkpoint") from error
        try:
            self._retain(target)
        except (OSError, UserError) as error:  # an extra checkpoint is the lesser evil
            self.say(f"An old checkpoint could not be removed: {error}")

    def _retain(self, newest: Path) -> None:
        # The checksum was verified when written or found.
        known = [found for found in self._readable() if found.path.name not in self._damaged]
        kept = {newest, *(found.path for found in known[: self.keep])}
        kept |= {found.path for found in [found for found in known if found.is_best][:1]}
        for found in known:
            if found.path not in kept:
                _remove(found.path)

    def _newest(self) -> Checkpoint | None:
        self.wait()
        leftovers = sorted(self._names(r"\.step-\d{8,}\.(partial|removed)"))
        for name in leftovers:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        if leftovers:
            self.say(f"Removed what a killed save left in {self.folder}: {', '.join(leftovers)}")
        for path in self._folders():
            try:
                return verify(path)
            except UserError as error:
                if error.code == "old-format":
                    raise
                self._damaged.add(path.name)
                self.say(f"Skipped the checkpoint {path.name}: {error.where}: {error.what}")
        return None

    def _readable(self) -> Iterator[Checkpoint]:
        """Yields those with a good manifest, newest first; others are replaced at their step."""
        for path in self._folders():
            with contextlib.suppress(UserError):
                yield verify(path, deep=False)

    def _folders(self) -> list[Path]:
        """Returns the folders under final names, newest first."""
        names = sorted(self._names(r"step-\d{8,}"), key=lambda name: -int(name[5:]))
        return [self.folder / name for name in names]

    def _names(self, pattern: str) -> list[str]:
        try:
            names = [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            what = f"the checkpoints cannot be read: {error.strerror}"
            raise UserError(what, where=self.folder) from error
        return [name for name in names if re.fullmatch(pattern, name)]


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Writes a .safetensors file; returns its size and sha256. The library would have to read it
    again for these, and a full disk would be no OSError."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**kind, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:

        def put(data: Any) -> None:
            digest.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for tensor in tensors.values():
            put(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    fsync(path)
    return 8 + len(text) + end, digest.hexdigest()


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes manifest.json, whose first line is the sha256 of the rest, and syncs the folder."""
    body = json.dumps(content).encode()
    with (folder / MANIFEST).open("xb") as file:
        file.write(_with_checksum(body))
    fsync(folder / MANIFEST)
    fsync(folder)


def _with_checksum(body: bytes) -> bytes:
    return b'{"sha256": "%s", "content":\n%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def verify(folder: Path, *, deep: bool = True) -> Checkpoint:
    """Reads the manifest and checks the size of the tensors and, if `deep`, their sha256."""
    path, state = folder / MANIFEST, folder / STATE
    try:
        raw = path.read_bytes()
        if raw.startswith(b'{\n "format": 1,'):
            what = "version 0.1 wrote this checkpoint, and only that version can resume it"
            fix = f"Train on from its weights: mixer finetune {folder.parents[1]} --data SOURCE"
            raise UserError(what, where=path, fix=fix, code="old-format")
        if raw != _with_checksum(raw.partition(b"\n")[2].removesuffix(b"}\n")):
            raise UserError("it is damaged: its checksum does not match", where=path)
        content = parse_json(raw)["content"]
        if content["format"] != FORMAT:
            what = f"its format is {content['format']!r}, this version reads {FORMAT}"
            raise UserError(what, where=path, fix="Update allmlp")
        if folder.name != f"step-{content['step']:08d}":
            raise UserError(f"the folder was renamed: it holds step {content['step']}", where=path)
        # Not a pipe, say, which to read would block.
        whole = stat.S_ISREG(state.lstat().st_mode) and state.stat().st_size == content["size"]
        if not whole or (deep and sha256_of(state) != content["sha256"]):
            raise UserError("it is damaged: its size or sha256 does not match", where=state)
    except OSError as error:
        what = f"it cannot be read: {error.strerror}"
        raise UserError(what, where=error.filename or folder) from error
    return Checkpoint(folder, content["step"], content["values"], content["is_best"])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        what = f"the checkpoint cannot be read: {error}"
        raise UserError(what, where=path, fix="Resume from a copy of the run") from error


def _check_same_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        there = {name: f"{s.get_dtype()} {s.get_shape()}" for name, s in slices.items()}
    here = {name: f"{_DTYPES[t.dtype]} {[*t.shape]}" for name, t in tensors.items()}
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if names:
        lines = [f"{n} is {there.get(n, 'not')} in it, {here.get(n, 'not')} here" for n in names]
        what = f"the checkpoint is of another model or optimizer: {some_of(lines, 4)}"
        raise UserError(what, where=path.parent, fix="Resume with its own config")


def _remove(path: Path) -> None:
    """Removes a checkpoint; if killed half-way, no part is left under the final name."""
    removed = path.with_name(f".{path.name}.removed")
    if removed.exists():
        shutil.rmtree(removed)
    path.rename(removed)
    shutil.rmtree(removed)
