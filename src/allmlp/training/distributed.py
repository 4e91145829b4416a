"""Several processes that train one model: the only file with collectives.

torchrun starts the processes and tells each its rank by environment variables; without them there
is one process, and nothing here does anything. Every process reads its share of every batch, so
that all together read what one alone would.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from allmlp.errors import UserError
from allmlp.models.device import choose_device
from allmlp.models.layers import ImageClassifier
from allmlp.training.meeting import Notes, meet

TIMEOUT = datetime.timedelta(minutes=30)  # the slowest process may be reading a cold disk
_PATIENCE = 3.0  # seconds to look for the reason of a lost connection


@dataclass(frozen=True)
class _Refusal:
    """A UserError on its way to the other processes."""

    what: str
    where: str | None
    fix: str | None


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this is.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: from 0 on each machine; it chooses the GPU.
        peers: for each rank its machine and process number.
        checkpoint_group: for checkpoints, which are written beside the training; None for one
            process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    peers: tuple[tuple[str, int], ...] = ()
    checkpoint_group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def mean(self, value: float) -> float:
        """Returns the mean of every process's number."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.size

    def largest(self, value: int) -> int:
        """Returns the largest of every process's number."""
        if self.size == 1:
            return value
        most = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def gather(self, value: Any) -> list[Any]:
        """Returns every process's value, by rank. (They trust each other: it may be any object.)"""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, function: Callable[[], Any]) -> Any:
        """Returns what the function returns on the first process, which alone calls it.

        Raises:
            UserError: the function raised it there; then all processes do.
        """
        if self.size == 1:
            return function()
        values: list[Any] = [None]
        if self.is_first:
            try:
                values = [function()]
            except UserError as error:
                values = [_Refusal(error.what, error.where, error.fix)]
        dist.broadcast_object_list(values, src=0)
        if isinstance(values[0], _Refusal):
            raise UserError(values[0].what, where=values[0].where, fix=values[0].fix)
        return values[0]

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors, the same ones on every process, with those of the first process."""
        if self.size > 1:
            for each in tensors:
                dist.broadcast(each, src=0)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def dead(self) -> list[int]:
        """Returns the ranks on this machine whose process is no more."""
        here = socket.gethostname()
        return [n for n, (host, pid) in enumerate(self.peers) if host == here and not _lives(pid)]


def launched() -> bool:
    """Returns whether torchrun, or something that speaks like it, started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


_joined: list[tuple[World, torch.device]] = []  # what this process has joined, if anything


@contextlib.contextmanager
def joined(device: str) -> Iterator[tuple[World, torch.device]]:
    """Joins the other processes while the block runs; yields the world and this one's device.

    Args:
        device: "auto", "cpu", "cuda"; with several processes each takes the GPU of its local rank.

    Raises:
        UserError: no such device, fewer GPUs than processes, or another process ended.
    """
    if not launched():
        yield World(), choose_device(device)
        return
    if _joined:  # a study joins once, for all of its runs
        yield _joined[-1]
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        if chosen.index is not None:
            what = f"device {device!r} names one GPU for {os.environ['WORLD_SIZE']} processes"
            raise UserError(what, fix="--device cuda: each process takes its own")
        chosen = choose_device(f"cuda:{local_rank}")
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store, rank, size = meet(TIMEOUT)
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
    notes = Notes(store, rank, size)
    try:
        alone = World(rank, size, local_rank)
        peers = tuple(alone.gather((socket.gethostname(), os.getpid())))
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        world = World(rank, size, local_rank, peers, group)
        _joined.append((world, chosen))
        try:
            yield world, chosen
        except UserError as error:
            notes.leave(error)
            raise
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            raise _lost(world, notes, error) from error
        finally:
            _joined.clear()
    finally:
        dist.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, dist.DistBackendError) or any(word in str(error) for word in words)


def _lost(world: World, notes: Notes, error: RuntimeError) -> UserError:
    """Returns what a broken connection means: whose process is gone, and why."""
    end = time.monotonic() + _PATIENCE
    while True:
        reasons = notes.found()
        gone = [rank for rank in world.dead() if rank != world.rank]
        if reasons or gone or time.monotonic() > end:
            break
        time.sleep(0.05)
    if reasons:
        rank, (what, where, fix) = min(reasons.items())
        return UserError(f"rank {rank}: {what}" if world.is_first else what, where=where, fix=fix)
    who = f"rank {', '.join(map(str, gone))}" if gone else "another process"
    what = f"rank {world.rank}: {who} ended, and training cannot go on: "
    fix = "The same command again continues; torchrun --max-restarts N does so by itself"
    return UserError(what + str(error).splitlines()[0][:200], fix=fix)


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not os.path.isdir("/proc/self")


def share_out(model: ImageClassifier, sharding: str, world: World) -> nn.Module:
    """Returns the model as all processes train it; its parameters stay those of `model`.

    Args:
        model: on its device, with the same weights on every process.
        sharding: "none": every process has all of the state (DDP); "full": each has a part of every
            parameter, gradient and optimiser state (FSDP2), and `model` itself becomes sharded.
        world: of this run.
    """
    if world.size == 1:
        return model
    if sharding == "none":
        device = next(model.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    for block in getattr(model, "blocks", ()):
        fully_shard(block)
    fully_shard(model)
    return model


@contextlib.contextmanager
def gradients_kept_here(network: nn.Module, here: bool) -> Iterator[None]:
    """Lets the block's gradients add up on each process; the next block outside shares them.

    Args:
        network: what `share_out` returned.
        here: whether to; False changes nothing.
    """
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not here)
        yield
    elif here and isinstance(network, DistributedDataParallel):
        with network.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor of which every process may have a part; all must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill_whole(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes named parameters, whole or in parts, into an ordinary model of the same names."""
    targets = dict(model.named_parameters())
    for name, tensor in tensors:
        targets[name].copy_(whole(tensor))
