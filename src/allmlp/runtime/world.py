"""Distributed processes; the only module with collectives.

torchrun starts the processes and sets their ranks in environment variables; without them there is a
single process and everything here is a no-op. Every process reads its part of every batch, together
the same images as a single process.
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
from allmlp.io import process_lives
from allmlp.runtime.device import choose_device

TIMEOUT = datetime.timedelta(minutes=30)  # the slowest process may be reading a cold disk
_PATIENCE = 3.0  # seconds to find the cause of a lost connection


@dataclass(frozen=True)
class World:
    """The group of processes, and this process's rank."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # rank on this machine; selects the GPU
    peers: tuple[tuple[str, int], ...] = ()  # by rank: machine and process id

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def all_reduce_mean(self, value: float) -> float:
        """Returns the mean over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.size

    def all_reduce_max(self, value: int) -> int:
        """Returns the maximum over all processes."""
        if self.size == 1:
            return value
        most = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def gather(self, value: Any) -> list[Any]:
        """Returns all processes' values by rank; any picklable object, from trusted peers."""
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
                values = [error]
        dist.broadcast_object_list(values, src=0)
        if isinstance(values[0], UserError):
            raise values[0]
        return values[0]

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors on every process with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier()

    def dead_ranks(self) -> list[int]:
        """Returns the ranks on this machine whose process has exited."""
        here = socket.gethostname()
        peers = enumerate(self.peers)
        return [n for n, (host, pid) in peers if host == here and not process_lives(pid)]


def is_distributed() -> bool:
    """Returns whether torchrun or a compatible launcher started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


_joined: list[tuple[World, torch.device]] = []  # joined world, if any
# Process groups are kept: DDP's reducer, which is freed while the GIL is held, would free the group
# and wait for gloo's thread, which may wait for the GIL to free the last collective's tensors.
_groups: list[Any] = []


@contextlib.contextmanager
def join_world(device: str) -> Iterator[tuple[World, torch.device]]:
    """Joins the process group within the block; yields the world and this process's device.

    With several processes and "cuda", each uses the GPU of its local rank.
    """
    if not is_distributed():
        yield World(), choose_device(device)
        return
    if _joined:  # a study joins once for all runs
        yield _joined[-1]
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device)
    if chosen.type == "mps":
        what = f"an Apple GPU takes one process, not {os.environ['WORLD_SIZE']}"
        raise UserError(what, where="device", fix="Start one process, or take cpu")
    if chosen.type == "cuda":
        if chosen.index is not None:
            what = f"device {device!r} names one GPU for {os.environ['WORLD_SIZE']} processes"
            raise UserError(what, where="device", fix="Take cuda: each process gets its own GPU")
        chosen = choose_device(f"cuda:{local_rank}")
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store, rank, size = _rendezvous(TIMEOUT)
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
    _groups.append(dist.group.WORLD)
    # An error in one process breaks the others' connections, so it leaves its reason here.
    notes = PrefixStore("notes", store)
    try:
        alone = World(rank, size, local_rank)
        peers = tuple(alone.gather((socket.gethostname(), os.getpid())))
        world = World(rank, size, local_rank, peers)
        _joined.append((world, chosen))
        try:
            yield world, chosen
        except UserError as error:
            with contextlib.suppress(RuntimeError):  # the store's process has exited
                note = (error.what, error.where, error.fix, error.code)
                notes.set(str(rank), json.dumps(note))
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
    """Returns a store used by this (re)start only, the rank and the world size.

    torchrun shares one store across restarts, with stale addresses of dead processes in it
    (pytorch/pytorch#135712). So rank 0 draws a random prefix for the store. The other ranks send a
    random name with their request, so that an answer cannot be one to their predecessor.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", name)
        name = store.get(f"answer/{name}").decode()  # blocks
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


def _is_lost_connection(error: RuntimeError) -> bool:
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, dist.DistBackendError) or any(word in str(error) for word in words)


def _lost(world: World, notes: Store, error: RuntimeError) -> UserError:
    """Explains a broken connection: which process has exited, and why."""
    others = [rank for rank in range(world.size) if rank != world.rank]
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        gone = set(others) & set(world.dead_ranks())
        with contextlib.suppress(RuntimeError):  # the store's process has exited
            for rank in others:
                if notes.check([str(rank)]):
                    what, where, fix, code = json.loads(notes.get(str(rank)))
                    what = f"rank {rank}: {what}" if world.is_main else what
                    return UserError(what, where=where, fix=fix, code=code)
        if gone:
            break
        time.sleep(0.05)
    gone = set(others) & set(world.dead_ranks())
    who = f"rank {', '.join(map(str, sorted(gone)))}" if gone else "another process"
    what = f"rank {world.rank}: {who} ended, and training cannot go on: "
    fix = "The same command again continues; torchrun --max-restarts N does so by itself"
    return UserError(what + str(error).splitlines()[0][:200], fix=fix)


def parallelize(model: nn.Module, sharding: str, world: World) -> nn.Module:
    """Wraps the model for distributed training; the parameters stay those of `model`.

    Sharding "none": every process holds the full state (DDP); "full": parameters, gradients and
    optimizer state are sharded (FSDP2), and `model` itself becomes sharded.
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
    """Accumulates local gradients within the block; the next backward outside reduces them."""
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
    """Gathers a tensor that may be sharded; a collective."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_full_parameters(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copies named parameters, full or sharded, into an unsharded model with the same names."""
    targets = dict(model.named_parameters())
    for name, tensor in tensors:
        targets[name].copy_(full_tensor(tensor))
