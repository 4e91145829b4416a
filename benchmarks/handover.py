"""What handing over an image from a loader process costs, without decoding: seconds of processor.

    python benchmarks/handover.py                        # this version
    python benchmarks/handover.py --other OTHER/src      # and another one, in turn

One loader process; the pixels are there already. Processor seconds of both processes per image (the
start of the loader process is taken off), the seconds until the first batch, and the largest part
of the shared memory in use.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS, SIZE = 5, 224
OWN = Path(__file__).resolve().parents[1] / "src"


def measure(batch_size: int, images: int) -> dict[str, float]:
    """Loads so many images; returns seconds and bytes."""
    import numpy as np

    from allmlp.data.loader import training_batches
    from allmlp.data.sampler import Order
    from allmlp.data.sources import open_source
    from allmlp.preprocessing import Preprocessing

    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    rules, order = Preprocessing(image_size=(SIZE, SIZE)), Order(seed=0, batch_size=batch_size)
    source = open_source("digits:train")

    def seconds() -> float:
        found = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        return sum(usage.ru_utime + usage.ru_stime for usage in found)

    def load(steps: int) -> tuple[float, float, int]:
        free = shutil.disk_usage("/dev/shm").free
        before, began, first, used = seconds(), time.perf_counter(), 0.0, 0
        batches = training_batches(
            source, rules, lambda *_: pixels, order, range(steps), num_workers=1
        )
        with contextlib.closing(batches):
            for batch in batches:
                first = first or time.perf_counter() - began
                used = max(used, free - shutil.disk_usage("/dev/shm").free)
                batch.images[:, 0, 0].sum()
        return seconds() - before, first, used

    short, first, _ = load(1)
    long, _, used = load(1 + images // batch_size)
    return {"cpu": (long - short) / images, "first": first, "shared": used}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--other", type=Path, help="src/ of another version")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    sides = {"this version": OWN} | ({"the other": options.other} if options.other else {})
    for batch_size, images in ((64, 2048), (1024, 4096)):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, path in sides.items():
                command = [sys.executable, __file__, "--child", str(batch_size), str(images)]
                environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
                line = subprocess.run(command, env=environment, capture_output=True, check=True)
                found[name].append(json.loads(line.stdout))
        for name, rounds in found.items():
            cpu, first, shared = (
                statistics.median(one[key] for one in rounds) for key in ("cpu", "first", "shared")
            )
            print(
                f"batches of {batch_size:5}, {name:12}  {1e6 * cpu:6.0f} us of processor an image, "
                f"first batch after {first:.2f} s, {shared / 2**20:5.0f} MiB of shared memory"
            )


if __name__ == "__main__":
    main()
