"""The tanh GELU of training on a CPU: torch's against the compiled one, alone and in a step.

    python benchmarks/gelu.py

A step is forward, backward and AdamW on one batch of random pixels. All sides are in one process
and take turns; medians, and the median ratio of a round to torch's tanh GELU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import figures
import torch
import torch.nn.functional as F

import allmlp as am
from allmlp.models.gelu import compile_gelu
from allmlp.runtime.device import Compiler, fast_precision, torch_settings
from allmlp.runtime.process import keep_freed_memory

CPU = torch.device("cpu")
CIFAR10 = {"patch_size": 4, "hidden_dim": 128, "tokens_mlp_dim": 56, "channels_mlp_dim": 512}
MODELS = {"S/16, 224 px": (8, 224, {}), "CIFAR-10 Mixer, 32 px": (128, 32, CIFAR10)}
Step = Callable[[], object]


def alone(dtype: torch.dtype, compiler: Compiler) -> dict[str, Step]:
    """GELUs of 8,192 x 512 values, forward and backward."""
    x = (torch.randn(8192, 512) * 2).to(dtype).requires_grad_()
    gradient = torch.randn(8192, 512).to(dtype)
    block = am.create_model("mixer_s16", num_blocks=1).blocks[0]
    compile_gelu(block, compiler)

    def step(function: Callable[[torch.Tensor], torch.Tensor]) -> Step:
        return lambda: torch.autograd.grad(function(x), x, gradient)

    return {
        "torch, tanh": step(lambda x: F.gelu(x, approximate="tanh")),
        "torch, exact": step(F.gelu),
        "compiled tanh": step(block.channel_mixing.gelu),
    }


def steps(name: str, precision: str, compiler: Compiler) -> dict[str, Step]:
    batch, size, overrides = MODELS[name]
    images = torch.randn(batch, 3, size, size)
    labels = torch.randint(10, (batch,))

    def step(gelu: str, compiled: bool) -> Step:
        model = am.create_model("mixer_s16", size, 10, gelu=gelu, **overrides).train()
        if compiled:
            compile_gelu(model, compiler)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {
        "torch, tanh": step("tanh", False),
        "torch, exact": step("exact", False),
        "compiled tanh": step("tanh", True),
    }


def compare(what: str, sides: dict[str, Step], rounds: int) -> None:
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 2):  # two to warm up and compile
        for side, step in sides.items():
            start = time.perf_counter()
            step()
            if number >= 2:
                seconds[side].append(time.perf_counter() - start)
    base = seconds["torch, tanh"]
    for side, found in seconds.items():
        ratio = statistics.median(b / f for b, f in zip(base, found, strict=True))
        milliseconds = 1e3 * statistics.median(found)
        print(f"| {what} | {side} | {milliseconds:,.1f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    print(figures.machine(options.threads))
    keep_freed_memory()
    compiler = Compiler(print)
    print("| what | GELU | ms | times as fast |\n| --- | --- | ---: | ---: |")
    for dtype in (torch.float32, torch.bfloat16):
        what = f"8,192 x 512 values, {str(dtype).removeprefix('torch.')}"
        with torch_settings(CPU, "float32", options.threads):
            compare(what, alone(dtype, compiler), options.rounds)
    for name in MODELS:
        precision, _ = fast_precision(CPU, 10**12)
        with torch_settings(CPU, precision, options.threads):
            compare(f"{name}, {precision}", steps(name, precision, compiler), options.rounds)


if __name__ == "__main__":
    main()
