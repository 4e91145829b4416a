"""Distributed processes, as torchrun starts them; the only module with collectives."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import mmap
import os
import pickle
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from allmlp.errors import UserError
from allmlp.io import machine, process_lives
from allmlp.names import NAME
from allmlp.runtime.device import choose_device
from allmlp.runtime.process import num_processes

TIMEOUT = datetime.timedelta(minutes=30)  # the slowest process may be reading a cold disk
_PATIENCE = 3.0  # seconds to find the cause of a lost connection
saving = threading.Lock()  # held while a checkpoint is written, which a failure elsewhere lets end


@dataclass(frozen=True)
class World:
    """The group of processes, and this process's rank."""

    rank: int = 0
    size: int = 1
    peers: tuple[tuple[str, int], ...] = ()  # by rank: machine and process id

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def gather_rows(self, values: Tensor) -> Tensor:
        """Returns all processes' values (n,) as (size, n) on their device; waits for no GPU."""
        if self.size == 1:
            return values[None]
        rows = values.new_zeros(self.size, len(values))
        rows[self.rank] = values
        dist.all_reduce(rows)
        return rows

    def all_reduce_max(self, value: int) -> int:
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
        values = [_tried(function) if self.is_main else None]
        dist.broadcast_object_list(values, src=0)
        return self._checked(values)[0]

    def once_per_machine(self, function: Callable[[], Any]) -> Any:
        """Calls the function on one process of every machine and returns its result, whose arrays
        share memory if they can, or raises the first UserError, on all."""
        if self.size == 1:
            return function()
        hosts = [host for host, _ in self.peers]
        first, value = hosts.index(hosts[self.rank]), None
        if self.rank == first:
            value = _tried(function)
        own = value if isinstance(value, UserError) else None if value is None else _share(value)
        shared = self._checked(self.gather(own))[first]
        with contextlib.suppress(OSError, ValueError):  # another container under the same name
            value = value if shared is None else _mapped(shared)  # on the first, too: one copy
        if value is None:
            value = function()
        self.barrier()  # until all have mapped it
        if isinstance(own, _Shared):
            os.close(own.descriptor)
        return value

    def _checked(self, values: list[Any]) -> list[Any]:
        """Raises the first UserError of these, which all have and rank 0 prints."""
        for rank, value in enumerate(values):
            if isinstance(value, UserError):
                value.is_printed = not self.is_main
                raise _of_rank(rank, value)
        return values

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def dead_ranks(self) -> list[int]:
        here, peers = machine(), enumerate(self.peers)
        return [n for n, (host, pid) in peers if host == here and not process_lives(pid)]


def _tried(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except UserError as error:
        return error


class _Shared(NamedTuple):
    """A value in memory that has no name but this, and ends with the last process that maps it."""

    process: int
    descriptor: int
    token: bytes  # what it begins with
    places: list[tuple[int, int]]  # first byte and size of the pickle and of every array in it


def _share(value: Any) -> _Shared | None:
    """Writes a value to memory for other processes; None if the system cannot."""
    arrays: list[pickle.PickleBuffer] = []
    parts = [pickle.dumps(value, protocol=5, buffer_callback=arrays.append)]
    try:
        shared = _Shared(os.getpid(), os.memfd_create(NAME), os.urandom(16), [])
    except (AttributeError, OSError):  # not Linux, or not allowed
        return None
    try:
        with open(shared.descriptor, "wb", closefd=False) as file:
            file.write(shared.token)
            for part in (*parts, *(array.raw() for array in arrays)):
                file.write(bytes(-file.tell() % 64))
                shared.places.append((file.tell(), len(part)))
                file.write(part)
    except OSError:  # too little memory
        os.close(shared.descriptor)
        return None
    return shared


def _mapped(shared: _Shared) -> Any:
    """Returns a shared value, whose arrays stay where they are until they are written to."""
    path = f"/proc/{shared.process}/fd/{shared.descriptor}"
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if file.read(len(shared.token)) != shared.token:
            raise ValueError("another file")
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    data, *arrays = (memory[start : start + size] for start, size in shared.places)
    return pickle.loads(data, buffers=arrays)


_joined: list[tuple[World, torch.device]] = []  # joined world, if any
# Process groups are kept: DDP's reducer, which is freed while the GIL is held, would free the group
# and wait for gloo's thread, which may wait for the GIL to free the last collective's tensors.
# They go before the interpreter does, whose end aborts the process if a thread waits for the GIL.
_groups: list[Any] = []
atexit.register(_groups.clear)


@contextlib.contextmanager
def join_world(device: str, *, independent: bool = False) -> Iterator[tuple[World, torch.device]]:
    """Joins the process group in the block; yields the world and this process's device. If one
    fails the others end, and if one is killed, unless they are `independent`."""
    if num_processes() == 1:
        yield World(), choose_device(device)
        return
    if _joined:  # a study joins once for all runs
        yield _joined[-1]
        return
    chosen = _own_device(choose_device(device), device)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store, rank, size = _rendezvous(TIMEOUT)
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
    _groups.append(dist.group.WORLD)
    notes, left = PrefixStore("notes", store), threading.Event()
    failed: list[tuple[World, Store]] = []
    atexit.register(_exit_after, failed)
    # A connection of its own, if torch can: one waits while the other is used.
    watching = (getattr(notes, "clone", lambda: notes)(), left, independent)
    watcher = threading.Thread(target=_end_with_the_others, args=watching, daemon=True)
    watcher.start()
    world = World(rank, size)
    try:
        peers = tuple(world.gather((machine(), os.getpid())))
        world = World(rank, size, peers)
        _joined.append((world, chosen))
        yield world, chosen
        world.barrier()  # a process that ends has failed, for those that have not left
    except (SystemExit, KeyboardInterrupt):  # all processes stop after the same step
        raise
    except BaseException as error:
        failed.append((world, notes))
        told = _told(world, notes, error)
        if told is error:
            raise
        raise told from error
    finally:
        with contextlib.suppress(RuntimeError):  # the store's process has exited
            notes.set(f"left {rank}", "")  # in good order, or having said why not
        if not failed:  # NCCL's would wait for the others, which wait for this process
            dist.destroy_process_group()
        left.set()
        watcher.join(_PATIENCE)
        _joined.clear()


def _own_device(chosen: torch.device, name: str) -> torch.device:
    local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if chosen.type == "cpu":
        return chosen
    if chosen.type == "mps" or chosen.index is not None:
        what = f"device {name!r} is one GPU, for {os.environ['WORLD_SIZE']} processes"
        raise UserError(what, where="device", fix="Take cuda, of which each gets its own, or cpu")
    if local_rank is None:
        what = "several processes, and nothing says which GPU is whose"
        raise UserError(what, where="LOCAL_RANK", fix="Start them with torchrun or srun")
    # Slurm may have given every process one GPU to see.
    is_bound = torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    return choose_device("cuda:0" if is_bound else f"cuda:{local_rank}")


def _exit_after(failed: list[tuple[World, Store]]) -> None:
    """Ends a process that has failed without NCCL's own end, which may wait for the others; rank 0,
    which has the notes without torchrun, ends last."""
    for world, notes in failed:
        sys.stdout.flush()
        sys.stderr.flush()
        others, end = set(range(1, world.size)), time.monotonic() + 2 * _PATIENCE
        is_agent = "TORCHELASTIC_USE_AGENT_STORE" in os.environ
        while world.is_main and not is_agent and others and time.monotonic() < end:
            others -= {rank for rank in others if notes.check([f"left {rank}"])}
            others -= set(world.dead_ranks())
            time.sleep(0.05)
        os._exit(1 if hasattr(sys, "last_value") else 2)


def _end_with_the_others(notes: Store, left: threading.Event, independent: bool) -> None:
    """Ends this process soon after another has failed or was killed: it may wait in C code for a
    GPU that waits for the other."""
    while not left.wait(1.0):
        world = _joined[0][0] if _joined and not independent else World()
        killed = world.dead_ranks()
        try:
            has_failed = notes.check(["failed"])
            killed = [rank for rank in killed if not notes.check([f"left {rank}"])]
        except RuntimeError:  # the process with the store has exited
            has_failed = True
        if (has_failed or killed) and not left.wait(_PATIENCE):
            with saving:
                if left.wait(1.0):
                    return
                own = str(world.rank)
                with contextlib.suppress(RuntimeError):
                    if not has_failed and notes.compare_set("failed", "", own).decode() == own:
                        print(f"error: {_ended(killed)}", file=sys.stderr, flush=True)
                os._exit(2)


def _rendezvous(timeout: datetime.timedelta) -> tuple[Store, int, int]:
    """Returns a store of this (re)start, the rank and the world size. torchrun's store has stale
    addresses after a restart (pytorch/pytorch#135712), so rank 0 draws a prefix, and answers the
    others' random names, which their predecessors did not have."""
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
            what = f"rank {ranks} did not join within {timeout.total_seconds():.0f} seconds"
            raise UserError(what)
        time.sleep(0.01)
    return PrefixStore(name, store), rank, size


def _told(world: World, notes: Store, error: Any) -> Any:
    """Lets the others end; returns the error, or what ended the process to which the connection is
    lost. Of the UserErrors of all processes one is printed, that of rank 0 if it comes soon."""
    if isinstance(error, UserError) and error.is_printed:
        return error
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    is_lost = isinstance(error, dist.DistBackendError) or any(word in str(error) for word in words)
    is_lost &= isinstance(error, RuntimeError)
    end = time.monotonic() + _PATIENCE * (is_lost or not world.is_main)
    own = first = str(world.rank)
    with contextlib.suppress(RuntimeError):  # the process with the store has exited
        while time.monotonic() < end and not notes.check(["failed"]):
            if is_lost and world.dead_ranks():
                break
            time.sleep(0.05)
        first = notes.compare_set("failed", "", own).decode()
    if is_lost:
        error = _ended(world.dead_ranks(), f": {str(error).splitlines()[0][:200]}")
    if isinstance(error, UserError):
        error.is_printed = first != own
        return _of_rank(world.rank, error)
    return error


def _of_rank(rank: int, error: UserError) -> UserError:
    if rank:
        error.what = f"rank {rank}: {error.what}"
        error.args = (error.text(),)
    return error


def _ended(ranks: list[int], reason: str = "") -> UserError:
    who = f"rank {', '.join(map(str, ranks))}" if ranks else "another process"
    fix = "Run the same command again to resume; torchrun --max-restarts N does so by itself"
    return UserError(f"{who} exited, so training cannot continue{reason}", fix=fix)


def parallelize(
    model: nn.Module, sharding: str, world: World, precision: str = "float32"
) -> nn.Module:
    """Wraps the model: "none" for DDP, "full" shards it, its gradients and their state (FSDP2).
    With "bfloat16" dense weights are rounded, as autocast would do, before they are gathered."""
    if world.size == 1:
        return model
    if sharding == "none":
        device = next(model.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        # Large buckets: torch.compile cuts the graph at each.
        return DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, bucket_cap_mb=100
        )
    shard(model, world.size, precision)
    return model


def shard(model: nn.Module, size: int, precision: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import

    # About in-place changes of what a block returns; `StochasticDepth` and the sums make none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    # Without one, torch takes a mesh of the machine's GPUs even for a model on the CPU.
    mesh = init_device_mesh(next(model.parameters()).device.type, (size,))
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in getattr(model, "blocks", ()):
        for part in block.children() if precision == "bfloat16" else ():
            owners = [m for m in part.modules() if list(m.parameters(recurse=False))]
            if owners and all(type(owner) is nn.Linear for owner in owners):
                fully_shard(part, mesh=mesh, mp_policy=half)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def innermost_shards(network: nn.Module) -> list[nn.Module]:
    """Returns the sharded modules that hold no other: the hooks of each gather its weights."""
    from torch.distributed.fsdp import FSDPModule

    shards = [module for module in network.modules() if isinstance(module, FSDPModule)]
    outer = {module for module in shards for part in shards if part in [*module.modules()][1:]}
    return [module for module in shards if module not in outer]


@contextlib.contextmanager
def no_sync(network: nn.Module, accumulate: bool = True) -> Iterator[None]:
    """Accumulates local gradients within the block; the next backward outside reduces them."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not accumulate)
    with contextlib.ExitStack() as stack:
        if accumulate and isinstance(network, DistributedDataParallel):
            stack.enter_context(network.no_sync())
        yield


@torch.no_grad()
def fill_from_rank0(target: Tensor, value: Tensor | None, world: World) -> None:
    """Fills a tensor that may be sharded with rank 0's value of all of it; a collective."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    in_place = target.is_contiguous() and not isinstance(target, DTensor)
    place = {"dtype": target.dtype, "device": target.device}
    whole = target.detach() if in_place else torch.empty(target.shape, **place)
    if value is not None:
        whole.copy_(value)
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements)
    elif whole.numel() and world.size > 1:
        dist.broadcast(whole.reshape(-1).view(torch.uint8), src=0)  # bits, of any type
    if not in_place:
        target.copy_(whole)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a tensor that may be sharded; a collective."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
