"""Memory of the loader on a source of a million images: the main process and each worker.

    python benchmarks/loader_memory.py

The index of a thousand packed digits is repeated until it has a million entries, which is what a
process holds of a real set of that size: place, label and a name of about 40 bytes for each. For
each process: all that is resident, how much that is above a process that has only imported
everything, and how much no other process shares (workers are forked).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from allmlp.data.loader import training_batches
from allmlp.data.sampler import Order
from allmlp.data.source import ByteRanges, PackedStrings, Source, labelled, subset
from allmlp.data.sources import open_splits
from allmlp.data.sources.packed import pack_splits
from allmlp.preprocessing import Preprocessing
from allmlp.training.dataset import Augmentation
from allmlp.training.recipes import recipe


def memory(pid: int | str) -> tuple[float, float]:
    """(private, resident) MB of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    values = {name: int(kib) * 1024 / 1e6 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", text)}
    return values["Private_Clean"] + values["Private_Dirty"], values["Rss"]


def repeated(folder: str, entries: int) -> Source:
    """Returns a source in which 1,000 packed images come again and again."""
    packed, times = open_splits(folder)["train"], entries // 1000
    index = packed.images
    assert isinstance(index, ByteRanges)
    names = (f"train/class_{n % 1000:04}/photograph_{n:012}.jpeg" for n in range(entries))
    arrays = (np.tile(array, times) for array in (index.file, index.offset, index.length))
    images = ByteRanges(index.files, *arrays, PackedStrings(names))
    return labelled(images, "train", packed.class_names, np.tile(packed.labels, times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is None:  # packed in a process of its own, to measure a fresh one
        with tempfile.TemporaryDirectory() as folder:
            train = open_splits("digits")["train"]
            pack_splits({"train": subset(train, np.arange(1000), "train")}, Path(folder))
            subprocess.run([sys.executable, *sys.argv, "--folder", folder], check=True)
        return
    _, before = memory("self")
    started = time.perf_counter()
    source = repeated(arguments.folder, arguments.entries)
    seconds = time.perf_counter() - started
    preprocessing = Preprocessing(image_size=(32, 32))
    batches = training_batches(
        source,
        preprocessing,
        Augmentation(recipe("scratch").augment, preprocessing),
        Order(seed=0, batch_size=64),
        range(12_345, 12_545),
        num_workers=arguments.workers,
    )
    started = time.perf_counter()
    next(batches)
    first = time.perf_counter() - started
    for _ in range(150):
        next(batches)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    print(
        f"{len(source):,} images, made in {seconds:.2f} s; first batch, of step 12,345, after "
        f"{first:.2f} s"
    )
    print(f"imports alone   {before:6.0f} MB resident")
    for name, pid in [("main process", "self"), *((f"worker {pid}", pid) for pid in children)]:
        try:
            private, resident = memory(pid)
        except OSError:
            continue  # not a worker: a helper process that has ended
        print(
            f"{name:15} {resident:6.0f} MB resident, {resident - before:4.0f} MB above imports, "
            f"{private:4.0f} MB its own"
        )
    for _ in batches:
        pass


if __name__ == "__main__":
    main()
