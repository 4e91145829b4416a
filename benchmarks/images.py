"""Images a second on one core, encoded bytes to a 224-pixel training batch: ours against timm's.

    taskset -c 0 python benchmarks/images.py 'flowers102_34c_*.parquet'

Both sides run in this process and take turns; the median of the rounds counts. timm's side is its
own transform pipeline and its own batching (create_transform with use_prefetcher, fast_collate):
like ours it ends with 8-bit pixels, which are scaled on the device. Where timm is not installed,
this goes on in an environment that has it beside ours, made on the first call (peers.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import peers
import torch
from PIL import Image

import allmlp as am
from allmlp.data.image import EncodedImage
from allmlp.data.loader import collate
from allmlp.data.sources import open_splits
from allmlp.preprocessing import Preprocessing
from allmlp.training.dataset import Augmentation

BATCH = 64


def ours(magnitude: float | None) -> Callable[[list[bytes], int], torch.Tensor]:
    augment = am.recipe("scratch").with_value("augment.crop_area", (0.05, 1.0)).augment
    if magnitude is not None:
        config = am.recipe("scratch").with_value("augment.randaugment", magnitude)
        augment = config.with_value("augment.crop_area", (0.05, 1.0)).augment
    transform = Augmentation(augment, Preprocessing(image_size=(224, 224)))

    def batch(files: list[bytes], seed: int) -> torch.Tensor:
        samples = []
        for index, data in enumerate(files):
            image = EncodedImage(data, index)
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index))))
            samples.append((transform(image, random), 0, index, []))
        return collate(samples).images

    return batch


def timms(magnitude: float | None) -> Callable[[list[bytes], int], torch.Tensor]:
    from timm.data import create_transform
    from timm.data.loader import fast_collate

    transform = create_transform(
        224,
        is_training=True,
        scale=(0.05, 1.0),
        interpolation="bilinear",
        color_jitter=None,
        auto_augment=None if magnitude is None else f"rand-m{magnitude:g}-n2",
        use_prefetcher=True,
    )

    def batch(files: list[bytes], seed: int) -> torch.Tensor:
        images = [transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
        return fast_collate([(image, 0) for image in images])[0]

    return batch


def speed(side: Callable[[list[bytes], int], torch.Tensor], files: list[bytes], seed: int) -> float:
    started = time.perf_counter()
    for at in range(0, len(files), BATCH):
        images = side(files[at : at + BATCH], seed)
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 224, 224)
    return len(files) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("data", help="a source with JPEG files")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=952)
    parser.add_argument("--environments", type=Path, default=peers.DEFAULT_FOLDER)
    arguments = parser.parse_args()
    if importlib.util.find_spec("timm") is None:
        python = str(peers.python_of("timm", arguments.environments))
        os.execv(python, [python, *sys.argv])
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    peers.import_timm()
    splits = open_splits(arguments.data).values()
    files = [source.read(index) for source in splits for index in range(len(source))]
    files = files[: arguments.images]
    sizes = [EncodedImage(data, "x").size for data in files]
    print(
        f"{len(files)} files of {np.mean([len(f) for f in files]) / 1000:.0f} kB, "
        f"shorter side {np.mean([min(size) for size in sizes]):.0f} pixels on average"
    )
    for name, magnitude in (("crop + flip", None), ("crop + flip + RandAugment(2, 15)", 15.0)):
        sides = {"ours": ours(magnitude), "timm": timms(magnitude)}
        for side in sides.values():
            speed(side, files[:BATCH], 0)
        figures: dict[str, list[float]] = {"ours": [], "timm": []}
        for turn in range(arguments.rounds):
            for side in sorted(sides, reverse=bool(turn % 2)):
                figures[side].append(speed(sides[side], files, turn))
        median = {side: statistics.median(values) for side, values in figures.items()}
        ratios = [a / b for a, b in zip(figures["ours"], figures["timm"], strict=True)]
        print(
            f"{name}: ours {median['ours']:,.0f}, timm {median['timm']:,.0f} images/s; "
            f"ratio {median['ours'] / median['timm']:.2f} "
            f"(rounds {min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
