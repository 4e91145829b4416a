"""The full state of a run on disk: written aside in the background, proved, renamed, retained.

checkpoints/
  step-00012000/            manifest.json and the files of torch.distributed.checkpoint (DCP)
  .step-00013000.partial/   being written; without its manifest until the rest lies on disk
  .step-00011000.removed/   on its way out

What has a good name is whole: the rename is the last step of a save and the first of a removal.
Only rank 0 makes, renames and removes folders.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from allmlp.errors import UserError
from allmlp.io import fsync
from allmlp.training.dcp_storage import Reader, StrictPlanner, Writer, without_hint
from allmlp.training.manifest import (
    folder_name,
    read_index,
    read_manifest,
    verify,
    write_manifest,
)

T = TypeVar("T")
_GOOD_NAME = re.compile(r"step-\d{8,}")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|removed)")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        path: of its folder.
        step: of the run.
        values: the JSON values that were saved with it.
    """

    path: Path
    step: int
    values: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Every method but `close` is for all processes of the group together.

    Args:
        folder: that holds them; made by the first save. All processes must see the same folder.
        keep: so many of the newest are kept, and the newest of the best; 1 or more.
        group: None for a single process; otherwise a group on a CPU backend (gloo) for nothing but
            this object, because a save talks over it in the background.
        say: is given a line about what was passed over or removed, on rank 0.

    Raises:
        ValueError: keep is below 1.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        group: dist.ProcessGroup | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, not {keep}")
        self.folder, self._keep, self._group, self._say = folder, keep, group, say
        self._rank = 0 if group is None else dist.get_rank(group)
        # One thread, which the interpreter waits for at its end: a save in progress is finished.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._damaged: set[str] = set()

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
        *,
        is_best: bool = False,
    ) -> None:
        """Copies the state and returns; the copy is written in the background.

        Waits for the save before this one. A step that lies there whole is left as it is.

        Args:
            step: of the run, 0 or more.
            tensors: by name, on any device, also sharded; one copy of them is held in CPU memory.
            values: everything else, as JSON values; those of rank 0 are written.
            is_best: this is the best step so far.

        Raises:
            UserError: the save before this one could not be written.
            TypeError: the values are not JSON values.
        """
        self.wait()
        values = json.loads(json.dumps(values))
        staged = {name: each.detach().to("cpu", copy=True) for name, each in tensors.items()}
        target = self.folder / folder_name(step)
        partial = target.with_name(f".{target.name}.partial")

        def publish() -> None:
            write_manifest(partial, step, is_best, values)
            self._publish(partial, target)

        writer = Writer(partial, publish)
        with without_hint():
            self._pending = self._thread.submit(self._write, staged, writer, partial, target)
            if self._group is None:
                writer.has_begun.wait()  # the hint comes just before

    def wait(self) -> None:
        """Returns once what was begun lies on disk under its name.

        Raises:
            UserError: it could not be written; on every rank, whichever failed.
        """
        if self._pending is not None:
            try:
                self._pending.result()
            finally:
                if self._pending.done():  # and not interrupted while waiting
                    self._pending = None

    def close(self) -> None:
        """Waits and ends the thread.

        Raises:
            UserError: what was begun could not be written.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def newest(self) -> Checkpoint | None:
        """Returns the newest checkpoint that is whole, every byte of it compared; None if none is.

        Says which ones are damaged and passed over, and removes what killed saves left behind.

        Raises:
            UserError: the folder cannot be read, or a save that was begun could not be written.
        """
        self.wait()
        return self._agree(self._newest)

    def load(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
        """Fills the tensors in place with those of a checkpoint, of a run on any number of ranks.

        Args:
            checkpoint: from `newest`.
            tensors: with the names, shapes and types of the checkpoint, all of them and no others.

        Raises:
            UserError: they differ from the checkpoint's, and nothing was loaded; or the checkpoint
                is not what this class wrote, or cannot be read.
        """
        self.wait()
        path = checkpoint.path
        index = self._agree(lambda: read_index(path, read_manifest(path)))
        try:
            with without_hint():
                load(
                    dict(tensors),
                    storage_reader=Reader(path, index),
                    planner=StrictPlanner(path),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except CheckpointException as error:
            raise self._failure(error, "read", path, "Resume from a copy of the run") from error

    # What follows runs on rank 0, or in the background, or both.

    def _agree(self, function: Callable[[], T]) -> T:
        """Returns on every rank what the function gives on rank 0, or raises what it raises."""
        if self._group is None:
            return function()
        outcome: list[Any] = [None, None]
        if self._rank == 0:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, group=self._group, group_src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _write(
        self, staged: dict[str, Tensor], writer: Writer, partial: Path, target: Path
    ) -> None:
        try:
            if self._agree(lambda: self._is_whole(target)):
                return
            save(
                staged,
                storage_writer=writer,
                planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            place = next(each for each in (self.folder, *self.folder.parents) if each.exists())
            free = shutil.disk_usage(place).free  # beside what was written of it
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            reasons = [each for each, _ in error.failures.values()]
            if any(isinstance(each, OSError) and each.errno in _FULL for each in reasons):
                raise _disk_full(target, staged, free) from error
            fix = "Mend that and resume the run; the checkpoint before this one is whole"
            raise self._failure(error, "written", target, fix) from error
        finally:
            writer.has_begun.set()

    def _failure(self, error: CheckpointException, done: str, path: Path, fix: str) -> UserError:
        """Returns the error of the user that a rank met, or one line for each rank that failed."""
        lines = []
        for rank, (each, _) in sorted(error.failures.items()):
            if isinstance(each, UserError):
                return each
            text = each.strerror if isinstance(each, OSError) else None
            text = text or (str(each) or type(each).__name__).splitlines()[0]
            lines.append(text if self._group is None else f"process {rank}: {text}")
        reasons = "\n".join(lines)
        return UserError(f"the checkpoint cannot be {done}: {reasons}", where=path, fix=fix)

    def _is_whole(self, path: Path) -> bool:
        try:
            if path.exists():
                verify(path)
                return True
        except (UserError, OSError):
            self._damaged.add(path.name)
        return False

    def _publish(self, partial: Path, target: Path) -> None:
        """Gives a folder that lies whole on disk its name, and removes older ones."""
        if target.exists():  # damaged, or nothing would have been written
            _remove(target)
        partial.rename(target)
        self._damaged.discard(target.name)
        fsync(self.folder)
        fsync(self.folder.parent)
        try:
            self._retain(target)
        except (OSError, UserError) as error:  # the run is better off with one checkpoint too many
            self._say(f"An old checkpoint could not be removed: {error}")

    def _retain(self, newest: Path) -> None:
        """Removes what is whole but neither among the newest nor the newest of the best."""
        known, best = [], None
        for path in self._folders():
            try:
                manifest = read_manifest(path)  # every byte was proved when it was written or found
            except UserError:
                continue  # it counts for nothing, and is replaced when the run comes to its step
            if path.name not in self._damaged:
                known.append(path)
                best = best or (path if manifest.is_best else None)
        for path in known:
            if path not in (newest, best, *known[: self._keep]):
                _remove(path)

    def _newest(self) -> Checkpoint | None:
        self._remove_leftovers()
        for path in self._folders():
            try:
                manifest = verify(path)
            except UserError as error:
                self._damaged.add(path.name)
                self._say(f"Passed over the checkpoint {path.name}: {error.where}: {error.what}")
            else:
                return Checkpoint(path, manifest.step, manifest.values)
        return None

    def _remove_leftovers(self) -> None:
        names = sorted(name for name in self._names() if _LEFTOVER.fullmatch(name))
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        if names:
            self._say(f"Removed what a killed save left in {self.folder}: {', '.join(names)}")

    def _folders(self) -> list[Path]:
        """Returns the folders under good names, newest first."""
        names = [name for name in self._names() if _GOOD_NAME.fullmatch(name)]
        return [self.folder / name for name in sorted(names, key=lambda n: -int(n[5:]))]

    def _names(self) -> list[str]:
        try:
            return [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            what = f"the checkpoints cannot be read: {error.strerror}"
            raise UserError(what, where=self.folder) from error


def _disk_full(target: Path, staged: dict[str, Tensor], free: int) -> UserError:
    needed = sum(each.numel() * each.element_size() for each in staged.values())
    what = f"the disk is full: the checkpoint needs {needed:,} bytes, {free:,} are free"
    fix = "Make room and resume the run; the checkpoint before this one is whole"
    return UserError(what, where=target, fix=fix)


def _remove(path: Path) -> None:
    """Removes a checkpoint; a kill in the middle leaves no part of it under the good name."""
    aside = path.with_name(f".{path.name}.removed")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    shutil.rmtree(aside)
