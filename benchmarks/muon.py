"""A step of Muon on a CPU: PyTorch's, in bfloat16, against ours in float32.

    python benchmarks/muon.py

Both optimize the hidden matrices of the recipes' CIFAR-10 Mixers with random gradients, in one
process and in turn; medians, and the median ratio of a round.
"""

from __future__ import annotations

import argparse
import statistics
import time

import figures
import torch
from torch import nn

import allmlp as am
from allmlp.models.layers import is_hidden_kernel
from allmlp.training.optim import Float32Muon


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(figures.machine(options.threads))
    print("| recipe | PyTorch's, ms | float32, ms | times as fast |\n| --- | ---: | ---: | ---: |")
    for recipe in ("cifar10_cpu", "cifar10"):
        overrides = am.recipe(recipe).model.overrides
        model = am.create_model("mixer_s16", 32, 10, **overrides)
        hidden = [p for name, p in model.named_parameters() if is_hidden_kernel(name, p)]
        sides = []
        for kind in (torch.optim.Muon, Float32Muon):
            copies = [nn.Parameter(parameter.detach().clone()) for parameter in hidden]
            sides.append((kind(copies, lr=1e-3), copies))
        seconds: list[list[float]] = [[], []]
        for number in range(options.rounds + 1):  # one to warm up
            gradients = [torch.randn_like(parameter) for parameter in hidden]
            for (optimizer, copies), found in zip(sides, seconds, strict=True):
                for copy, gradient in zip(copies, gradients, strict=True):
                    copy.grad = gradient.clone()
                began = time.perf_counter()
                optimizer.step()
                if number:
                    found.append(time.perf_counter() - began)
        theirs, ours = (1e3 * statistics.median(found) for found in seconds)
        ratio = statistics.median(one / other for one, other in zip(*seconds, strict=True))
        print(f"| `{recipe}` | {theirs:.0f} | {ours:.0f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
