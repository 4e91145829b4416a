"""Device, precision, compilation, threads and memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from allmlp.errors import UserError

SMALL_STEP = 2e9  # FLOPs
# Compiling takes about a minute (a GELU, on a CPU, seconds): it pays off if a run takes ten. A step
# takes at least the time of its launches, and else that of its FLOPs, on an H200 or a few cores.
LONG_RUN, STEP_SECONDS, FLOPS_PER_SECOND = 600.0, 5e-3, {"cuda": 3e14, "cpu": 1e11}
_threads_are_chosen: ContextVar[bool] = ContextVar("_threads_are_chosen", default=False)


def choose_device(name: str) -> torch.device:
    """Returns the named device; "auto" is a CUDA GPU, else an Apple GPU, else the CPU."""
    gpus = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = next((kind for kind, number in gpus.items() if number), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if (device.index or 0) >= {"cpu": 1, **gpus}.get(device.type, 0):
        there = ", ".join(f"{number} of {kind}" for kind, number in gpus.items())
        what = f"device {name!r} is unknown or not here, where PyTorch finds GPUs: {there}"
        fix = "auto, cpu, cuda, cuda:0 or mps (macOS on Apple silicon with a native Python)"
        raise UserError(what, where="device", fix=fix)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # pinning memory would open a context on GPU 0
    return device


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies to the device without waiting for a GPU, which a copy from other memory does."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Returns a stream for copies; None on a CPU, where there is nothing to overlap."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Transfer:
    """Tensors being copied to the CPU on a side stream, while the GPU computes."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], stream: torch.cuda.Stream | None) -> None:
        self._event: torch.cuda.Event | None = None
        if stream is None:
            self._arrays = tuple(tensor.cpu() for tensor in tensors)
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._arrays = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
            self._event = torch.cuda.Event()
            self._event.record(stream)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(stream)

    def wait(self) -> tuple[np.ndarray, ...]:
        if self._event is not None:
            self._event.synchronize()
        return tuple(array.numpy() for array in self._arrays)


def empty_cache(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def check_device_of_exported(device: str | None) -> None:
    """Raises UserError for any device but the CPU, the only one for exported files."""
    if device not in (None, "auto", "cpu"):
        what = f"device {device!r}: an exported file runs on the CPU"
        raise UserError(what, where="device", fix="Leave it out")


@dataclass(frozen=True)
class ComputePolicy:
    device: torch.device
    precision: str  # of matmuls, "float32" or "bfloat16"
    compile: bool  # whether to use torch.compile
    why: str  # description of the choice and its reason
    compile_gelu: bool = False  # whether to compile the tanh GELU alone

    @property
    def compiles(self) -> bool:
        """Whether the first step compiles anything, and so takes longer than the others."""
        return self.compile or self.compile_gelu

    def autocast(self) -> torch.autocast:
        is_half = self.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_half)


def choose_policy(
    device: torch.device, precision: str, compile: str, *, operations: int, num_steps: int
) -> ComputePolicy:
    """Resolves "auto" for precision and compile, by the FLOPs of a step of this process."""
    reasons = [precision]
    if precision == "auto":
        precision, why = fast_precision(device, operations)
        reasons = [f"{precision} ({why})"]
    elif precision == "bfloat16":
        check_bfloat16(device)
    compiles, compiles_gelu = compile == "on" and can_compile(device), False
    if compile == "auto":
        compiles = pays_to_compile(device, operations, num_steps)
        # In float32 the matrix products take so long that the GELU does not matter.
        is_half = device.type == "cpu" and precision == "bfloat16"
        compiles_gelu = is_half and _takes_long(device, operations, num_steps)
    if compiles or compiles_gelu:
        reasons.append("compiled" if compiles else "GELU compiled")
    elif compile == "on":
        reasons.append("not compiled: no compiler found")
    return ComputePolicy(device, precision, compiles, ", ".join(reasons), compiles_gelu)


def pays_to_compile(device: torch.device, operations: int, num_steps: int) -> bool:
    """Returns whether so many steps, or batches, of these FLOPs take a GPU `LONG_RUN`."""
    return device.type == "cuda" and _takes_long(device, operations, num_steps)


def _takes_long(device: torch.device, operations: int, num_steps: int) -> bool:
    seconds = num_steps * max(STEP_SECONDS, operations / FLOPS_PER_SECOND[device.type])
    return seconds >= LONG_RUN and can_compile(device)


def fast_precision(device: torch.device, operations: int) -> tuple[str, str]:
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "bfloat16", "this GPU is fast at it"
        return "float32", "this GPU has no fast bfloat16"
    if device.type == "mps":
        return "float32", "an Apple GPU"
    if operations < SMALL_STEP:  # casts cost more than bfloat16 gains
        return "float32", "a small model"
    if has_fast_bfloat16():
        return "bfloat16", "this processor is fast at it"
    return "float32", "this processor has no fast bfloat16"


def check_bfloat16(device: torch.device) -> None:
    is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if is_old or device.type == "mps":
        what = f"bfloat16 on {device}: of GPUs, those of compute capability 8.0 have it"
        raise UserError(what, where="precision", fix="Use float32")


def has_fast_bfloat16() -> bool:
    """Returns whether the CPU has bfloat16 matmul instructions (AVX512_BF16 or AMX)."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("amx_tile"))


class Compiler:
    """torch.compile up to its first failure; then functions run as they are."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self.say, self.works = say, True

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(function)

        def call(*arguments: Any) -> Any:
            try:
                if self.works:
                    return compiled(*arguments)
            except RuntimeError as error:
                # By name: importing its exceptions takes as long as importing torch.
                if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise
                self.works, first = False, str(error).strip().splitlines()[0][:200]
                self.say(f"note     not compiled after all: {first}")
            return function(*arguments)

        return call


def can_compile(device: torch.device) -> bool:
    named = os.environ.get("CXX") or os.environ.get("CC")
    if named:
        return shutil.which(named.split()[0]) is not None
    names = ("g++", "clang++", "c++") if device.type == "cpu" else ("gcc", "cc", "clang")
    return any(shutil.which(name) for name in names)


def keep_compiled(folder: Path | None) -> None:
    """Makes torch.compile choose the same kernels every time, and keeps its cache in a folder; of
    several processes (None), which would wait for each other's locks, in torch's temporary one."""
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # read when it is imported
    config: Any = sys.modules.get("torch._inductor.config")
    if config is not None:
        config.deterministic = os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1"
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def cores_of_process() -> int:
    """Returns how many of the machine's cores this process may use beside its neighbours."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def threads_for(operations: float) -> int:
    """Returns the CPU threads for a step of this many FLOPs: one or all (docs/decisions.md, 9)."""
    is_small = operations < SMALL_STEP and not _threads_are_chosen.get()
    return 1 if is_small else torch.get_num_threads()


@contextlib.contextmanager
def step_threads(device: torch.device, operations: float) -> Iterator[None]:
    """Sets the threads for a step on a CPU within the block; restores them afterwards."""
    before, threads = torch.get_num_threads(), threads_for(operations)
    if device.type != "cpu" or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def torch_settings(
    device: torch.device,
    precision: str,
    num_threads: int | None = None,
    *,
    step_operations: float | None = None,
) -> Iterator[None]:
    """Sets torch's threads and matmul settings in the block. `num_threads` applies to small steps
    too; evaluations during training use the threads of a step of `step_operations`."""
    if num_threads is not None:
        check_threads(num_threads)
    elif step_operations is not None and threads_for(step_operations) == 1:
        num_threads = 1
    is_chosen = num_threads is not None or step_operations is not None
    chosen = _threads_are_chosen.set(is_chosen or _threads_are_chosen.get())
    products: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    threads, before = torch.get_num_threads(), products.fp32_precision
    try:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if device.type == "cpu" and precision == "float32":
            _prefer_onednn(products)
        with exact_matmuls(device):
            yield
    finally:
        products.fp32_precision = before
        torch.set_num_threads(threads)
        _threads_are_chosen.reset(chosen)


@contextlib.contextmanager
def exact_matmuls(device: torch.device) -> Iterator[None]:
    """On a GPU, in the block, float32 is not TF32, sums are not bfloat16, and runs repeat."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    settings: list[tuple[Any, str, bool]] = [
        *((cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)),
        *((cudnn, "deterministic", True), (cudnn, "benchmark", False)),
        (matmul, "allow_bf16_reduced_precision_reduction", False),
    ]
    with contextlib.ExitStack() as stack:
        for place, name, value in settings if device.type == "cuda" else ():
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        yield


def _prefer_onednn(products: Any) -> None:
    """Uses oneDNN, faster than MKL on CPUs that are not Intel's, if it keeps float32 precision: the
    setting permits bfloat16."""
    before = products.fp32_precision
    random = torch.Generator().manual_seed(0)
    x, w = (torch.randn(256, 256, generator=random) for _ in range(2))
    exact = x.double() @ w.double().T
    products.fp32_precision = "bf16"
    if (F.linear(x, w) - exact).abs().max() > 1e-5 * exact.abs().max():
        products.fp32_precision = before


def check_threads(num_threads: int) -> None:
    most = max(256, 8 * (os.cpu_count() or 1))
    if not 1 <= num_threads <= most:
        what = f"threads must be from 1 to {most} on this machine, got {num_threads}"
        raise UserError(what, where="num_threads", fix="Leave it out to use all cores")


def free_memory(device: torch.device) -> int | None:
    """Returns the device's free memory in bytes; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    found = [_memory("MemAvailable"), *map(_left_in_group, _groups())]
    return min((free for free in found if free is not None), default=None)


def _groups() -> list[Path]:
    """Returns the control groups (version 2) of this process: a container's, a batch job's."""
    root = Path("/sys/fs/cgroup")
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
    except OSError:
        return [root]
    return [root, *(root / part for part in (Path(own), *Path(own).parents) if part.name)]


def _left_in_group(group: Path) -> int | None:
    """Returns the free memory of a control group in bytes; None without a limit."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (group / "memory.stat").read_text().splitlines()
        statistics = dict(line.split() for line in lines)
        cached = sum(int(statistics[f"{kind}_file"]) for kind in ("active", "inactive"))
        return max(0, limit - used + cached)  # cached files make room
    except (OSError, ValueError, KeyError):
        return None


def total_memory(device: torch.device) -> int | None:
    """Returns the device's total memory in bytes, for a CPU including swap; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return _memory("MemTotal", "SwapTotal")


def _memory(*names: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return sum(int(lines[name].split()[0]) * 1024 for name in names)
    except (OSError, KeyError, ValueError):
        return None


def check_fits_memory(num_values: int, what: str, device: str | torch.device = "cpu") -> None:
    available, needed = total_memory(torch.device(device)) or 2**40, 4 * num_values
    if needed > available:
        gibibytes = f"{needed / 2**30:,.0f} GiB, the machine has {available / 2**30:,.0f}"
        raise UserError(f"{what} needs {gibibytes}", fix="Take a smaller number")
