"""What a growth of the image size does to accuracy: a trained Mixer at other sizes, before and
after one epoch of fine-tuning, beside a fresh model of that size.

    python benchmarks/resolution.py RUN --data FOLDER --sizes 48 64 96

RUN is a run folder of `mixer train`, FOLDER has train/ and test/ class folders of small images
(CIFAR-10). Images are enlarged bilinearly, straight to each size. Fine-tuning and the fresh model
get the same: AdamW, cosine to zero after a warm-up of 5 %, flips and shifts of up to 4 pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, pad

import allmlp as am
from allmlp.data.image import decode
from allmlp.data.sources import open_splits
from allmlp.models.catalog import model_from_config
from allmlp.models.mixer import token_weights
from allmlp.models.resize import resize_tokens

BATCH = 128


def pixels_of(source) -> tuple[Tensor, Tensor]:
    images = [np.asarray(decode(source.read(at), at)) for at in range(len(source))]
    labels = torch.from_numpy(np.asarray(source.labels))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


def enlarge(images: Tensor, size: int) -> Tensor:
    images = images.float() / 127.5 - 1
    if images.shape[-1] == size:
        return images
    return interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


@torch.inference_mode()
def accuracy(model, size: int, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = 0
    for at in range(0, len(images), 500):
        logits = model(enlarge(images[at : at + 500], size))
        right += int((logits.argmax(1) == labels[at : at + 500]).sum())
    return right / len(images)


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    flipped = torch.rand(len(images), generator=random) < 0.5
    images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    side = images.shape[-1]
    shifts = torch.randint(0, 9, (len(images), 2), generator=random).tolist()
    padded = pad(images, (4, 4, 4, 4))
    cut = [each[:, y : y + side, x : x + side] for each, (y, x) in zip(padded, shifts, strict=True)]
    return torch.stack(cut)


def fine_tune(model, size: int, images: Tensor, labels: Tensor, rate: float, seed: int) -> None:
    model.train()
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    order = torch.randperm(len(images), generator=random)
    steps = len(images) // BATCH
    for step in range(steps):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        warm, progress = min(1.0, (step + 1) / (0.05 * steps)), step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
        inputs = enlarge(augment(images[chosen], random), size)
        loss = cross_entropy(model(inputs), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def resampled(run: str, size: int, interpolation: str):
    model = am.load_model(run, quiet=True)
    config = dataclasses.replace(model.config, image_size=(size, size))
    tensors = dict(model.state_dict())
    weights = token_weights(model.config)
    resize_tokens(tensors, weights, model.config, config, "resample", interpolation)
    grown = model_from_config(config)
    grown.load_state_dict(tensors)
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[48, 64, 96])
    parser.add_argument("--rates", type=float, nargs=2, default=[1e-3, 2e-3], help="tuned, fresh")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", choices=["straight", "tuned", "both"], default="both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    splits = open_splits(options.data)
    images, labels = pixels_of(splits["train"])
    test_images, test_labels = pixels_of(splits["test"])
    base = am.load_model(options.run, quiet=True)
    own = base.config.image_size[0]
    print(f"{own} px, as trained: {accuracy(base, own, test_images, test_labels):.2%}", flush=True)
    for size in options.sizes:
        models = {}
        if size % own == 0:
            models["block-diagonal"] = am.load_model(
                options.run, size, resize_weights="block-diagonal", quiet=True
            )
        for kind in ("nearest", "bilinear", "bicubic"):
            models[f"resample ({kind})"] = resampled(options.run, size, kind)
        for name, model in models.items() if options.measure != "tuned" else ():
            straight = accuracy(model, size, test_images, test_labels)
            print(f"{size} px  {name:20}  straight {straight:7.2%}", flush=True)
        if options.measure == "straight":
            continue
        torch.manual_seed(options.seed)
        config = dataclasses.replace(base.config, image_size=(size, size))
        models["fresh"] = model_from_config(config)
        for name in ("resample (nearest)", "block-diagonal", "fresh"):
            if name not in models:
                continue
            started = time.perf_counter()
            rate = options.rates[name == "fresh"]
            fine_tune(models[name], size, images, labels, rate, options.seed)
            tuned = accuracy(models[name], size, test_images, test_labels)
            seconds = time.perf_counter() - started
            print(f"{size} px  {name:20}  tuned {tuned:7.2%}  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
