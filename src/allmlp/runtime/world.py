"""Several processes that work on one model: the only file with collectives.

torchrun starts the processes and gives each its rank by environment variables; without them there
is one process, and nothing here does anything. Every process reads its part of every batch, so that
all together read what one process alone would.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from allmlp.errors import UserError
from allmlp.runtime.device import choose_device

TIMEOUT = datetime.timedelta(minutes=30)  # the slowest process may be reading a cold disk
_PATIENCE = 3.0  # seconds to look for the reason of a lost connection


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way to the other processes."""

    what: str
    where: str | None
    fix: str | None
    code: str


@dataclass(frozen=True)
class World:
    """The processes that work together, and which of them this is.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        local_rank: from 0 on each machine; it chooses the GPU.
        peers: for each rank its machine and process number.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    peers: tuple[tuple[str, int], ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all_reduce_mean(self, value: float) -> float:
        """Returns the mean of all processes' numbers."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.size

    def all_reduce_max(self, value: int) -> int:
        """Returns the largest of all processes' numbers."""
        if self.size == 1:
            return value
        most = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def gather(self, value: Any) -> list[Any]:
        """Returns all processes' values by rank. (They trust each other: any object.)"""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_from_rank0(self, function: Callable[[], Any]) -> Any:
        """Calls the function on rank 0 and returns its result, or raises its UserError, on all."""
        if self.size == 1:
            return function()
        values: list[Any] = [None]
        if self.is_main:
            try:
                values = [function()]
            except UserError as error:
                values = [_Failure(error.what, error.where, error.fix, error.code)]
        dist.broadcast_object_list(values, src=0)
        if isinstance(failure := values[0], _Failure):
            raise UserError(failure.what, where=failure.where, fix=failure.fix, code=failure.code)
        return values[0]

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors, the same ones on every process, with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Waits until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def dead_ranks(self) -> list[int]:
        """Returns the ranks on this machine whose process has ended."""
        here = socket.gethostname()
        return [n for n, (host, pid) in enumerate(self.peers) if host == here and not _lives(pid)]


def is_distributed() -> bool:
    """Returns whether torchrun, or a launcher with its variables, started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


_joined: list[tuple[World, torch.device]] = []  # what this process has joined, if anything


@contextlib.contextmanager
def join_world(device: str) -> Iterator[tuple[World, torch.device]]:
    """Joins the other processes within the block; yields the world and this process's device.

    Args:
        device: "auto", "cpu", "cuda"; with several processes each takes the GPU of its local rank.
    """
    if not is_distributed():
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
            raise UserError(what, where="device", fix="Take cuda: each process gets its own GPU")
        chosen = choose_device(f"cuda:{local_rank}")
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store, rank, size = _rendezvous(TIMEOUT)
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
    notes = _Notes(store, rank, size)
    try:
        alone = World(rank, size, local_rank)
        peers = tuple(alone.gather((socket.gethostname(), os.getpid())))
        world = World(rank, size, local_rank, peers)
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


def _rendezvous(timeout: datetime.timedelta) -> tuple[Store, int, int]:
    """Returns a store that only the processes of this start use, the rank, and the world size.

    torchrun has one store for all its restarts, and what dead processes have written there would
    mislead the living: to addresses where nobody listens any more (pytorch/pytorch#135712). So rank
    0 draws a name for the part of the store that is used. A name drawn by each of the others shows
    that it has been answered itself, and not the process that had its rank before.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", name)
        name = store.get(f"answer/{name}").decode()  # waits for it
        store.set(f"{name}/heard/{rank}", "")
        return PrefixStore(name, store), rank, size
    waiting, end = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"{name}/heard/{other}"]):
                waiting.remove(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", name)
        if time.monotonic() > end:
            ranks = ", ".join(map(str, sorted(waiting)))
            raise UserError(f"rank {ranks} did not come in {timeout.total_seconds():.0f} seconds")
        time.sleep(0.01)
    return PrefixStore(name, store), rank, size


class _Notes:
    """What processes leave for each other in the store, where they meet in no collective any more.

    An error of one process breaks the connections of all others without a reason; so it leaves a
    note of the error first.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank = PrefixStore("notes", store), rank
        self._others = [other for other in range(size) if other != rank]

    def leave(self, error: UserError) -> None:
        """Leaves the error by which this process ends."""
        with contextlib.suppress(RuntimeError):  # the process that kept the store has ended
            self._store.set(str(self._rank), json.dumps((error.what, error.where, error.fix)))

    def found(self) -> dict[int, tuple[str, str | None, str | None]]:
        """Returns the notes of other processes: what, where and fix by rank."""
        notes = {}
        with contextlib.suppress(RuntimeError):
            for rank in self._others:
                if self._store.check([str(rank)]):
                    notes[rank] = tuple(json.loads(self._store.get(str(rank))))
        return notes


def _is_lost_connection(error: RuntimeError) -> bool:
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, dist.DistBackendError) or any(word in str(error) for word in words)


def _lost(world: World, notes: _Notes, error: RuntimeError) -> UserError:
    """Returns what a broken connection means: which process has ended, and why."""
    end = time.monotonic() + _PATIENCE
    while True:
        reasons = notes.found()
        gone = [rank for rank in world.dead_ranks() if rank != world.rank]
        if reasons or gone or time.monotonic() > end:
            break
        time.sleep(0.05)
    if reasons:
        rank, (what, where, fix) = min(reasons.items())
        return UserError(f"rank {rank}: {what}" if world.is_main else what, where=where, fix=fix)
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


def parallelize(model: nn.Module, sharding: str, world: World) -> nn.Module:
    """Returns the model as all processes train it; its parameters stay those of `model`.

    Args:
        model: on its device, with the same weights on every process.
        sharding: "none": every process has all of the state (DDP); "full": each has a part of every
            parameter, gradient and optimizer state (FSDP2), and `model` itself becomes sharded.
        world: of this run.
    """
    if world.size == 1:
        return model
    if sharding == "none":
        device = next(model.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import fully_shard  # slow to import

    for block in getattr(model, "blocks", ()):
        fully_shard(block)
    fully_shard(model)
    return model


@contextlib.contextmanager
def no_sync(network: nn.Module, accumulate: bool = True) -> Iterator[None]:
    """Accumulates gradients on each process within the block; the next one outside reduces them.

    Args:
        network: what `parallelize` returned.
        accumulate: False changes nothing.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not accumulate)
        yield
    elif accumulate and isinstance(network, DistributedDataParallel):
        with network.no_sync():
            yield
    else:
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns all of a tensor that may be sharded over the processes; a collective."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_full_parameters(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copies named parameters, full or sharded, into an ordinary model with the same names."""
    targets = dict(model.named_parameters())
    for name, tensor in tensors:
        targets[name].copy_(full_tensor(tensor))
