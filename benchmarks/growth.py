"""Growing trained weights to another image size: the identity, the time and the peak memory.

    python benchmarks/growth.py

Weights are random (N(0, 1/fan_in), biases N(0, 0.1), a filled head), written in Google's layout and
in ours, so that nothing has to be downloaded. Each growth runs in a process of its own; memory is
the peak resident size above that after importing, as a multiple of the new model's parameters.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import allmlp as am

GROW = """
import json, re, sys, time
import torch, allmlp as am
from allmlp.weights import load  # all imports before the measurement
am.load_model, am.create_model
def peak_kib():  # of this process image; ru_maxrss would include the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak_kib()
started = time.perf_counter()
size = None if sys.argv[2] == "None" else int(sys.argv[2])
model = am.load_model(sys.argv[1], size, resize_weights=sys.argv[3], quiet=True)
for parameter in model.parameters():
    parameter.data.sum()  # every page is there
seconds = time.perf_counter() - started
peak = peak_kib() - before
new = sum(p.nbytes for p in model.parameters())
print(json.dumps({"seconds": seconds, "peak_MiB": peak / 1024, "model_MiB": new / 2**20}))
"""


def write_random(name: str, folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    model = am.create_model(name)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return {
        ".npz": am.save_model(model, folder / f"{name}.npz", format="google"),
        ".safetensors": am.save_model(model, folder / f"{name}.safetensors"),
    }


def identity(path: Path, factor: int) -> None:
    """Prints how far the grown logits are from the mean over the tiles of the old logits."""
    old, side = am.load_model(path, quiet=True), 224
    started = time.perf_counter()
    new = am.load_model(path, side * factor, resize_weights="block-diagonal", quiet=True)
    seconds = time.perf_counter() - started
    images = torch.rand(2, 3, side * factor, side * factor) * 2 - 1
    starts = range(0, side * factor, side)
    with torch.inference_mode():
        tiles = [old(images[:, :, y : y + side, x : x + side]) for y in starts for x in starts]
        expected, found = torch.stack(tiles).mean(dim=0), new(images)
    error, largest = (found - expected).abs().max(), expected.abs().max()
    print(
        f"224 -> {side * factor}: largest difference {error:.1e}, of the largest logit "
        f"{error / largest:.1e}; grown in {seconds:.1f} s",
        flush=True,
    )


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("mixer_b16, block-diagonal: mean of the tiles' logits against the grown model's")
        b16 = write_random("mixer_b16", folder)
        for factor in (2, 3):
            identity(b16[".npz"], factor)
        for name, paths in (("mixer_b16", b16), ("mixer_l16", write_random("mixer_l16", folder))):
            for size, growth in ((None, "auto"), (448, "block-diagonal"), (448, "resample")):
                for suffix, path in paths.items():
                    runs = []
                    for _ in range(3):
                        command = [sys.executable, "-c", GROW, str(path), str(size), growth]
                        out = subprocess.run(command, capture_output=True, text=True, check=True)
                        runs.append(json.loads(out.stdout))
                    runs.sort(key=lambda run: run["seconds"])
                    run = runs[1]
                    print(
                        f"{name}{suffix} -> {size or 'as it is'} {growth}: median "
                        f"{run['seconds']:.1f} s, peak {run['peak_MiB']:,.0f} MiB = "
                        f"{run['peak_MiB'] / run['model_MiB']:.2f} x the model's "
                        f"{run['model_MiB']:,.0f} MiB",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
