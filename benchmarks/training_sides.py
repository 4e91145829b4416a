"""One side of benchmarks/training.py, in the environment of its package.

What is timed is a step: forward, backward, clipping at norm 1, AdamW, the loss read by the host;
one batch of random pixels again and again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import peers
import turns

STEPS = 1_000  # of the run that the step is taken from; the rate and `auto` go by it
DROP = 0.1  # stochastic depth

Step = Callable[[int], float]  # its number -> its loss


def images_and_labels(job: dict[str, Any]) -> tuple[Any, Any]:
    import torch

    random = torch.Generator().manual_seed(0)
    shape = (job["batch"], 3, job["image_size"], job["image_size"])
    images = torch.randn(shape, generator=random)
    return images, torch.randint(job["num_classes"], (job["batch"],), generator=random)


def ours(job: dict[str, Any]) -> tuple[Step, str]:
    """The step of `mixer train`, settings of the job over its defaults."""
    import torch
    import torch.nn.functional as F

    import allmlp as am
    from allmlp.models.layers import draw_stochastic_depth
    from allmlp.runtime.device import choose_policy, torch_settings
    from allmlp.runtime.world import World
    from allmlp.training.optim import build_optimizers
    from allmlp.training.step import Updater

    size, classes, batch = job["image_size"], job["num_classes"], job["batch"]
    overrides: dict[str, Any] = {
        "stochastic_depth": DROP,
        "num_blocks": job["num_blocks"],
        "gelu": job["gelu"],
    }
    config = am.recipe("scratch").with_values(
        {
            "model.name": job["model"],
            "model.image_size": size,
            "model.overrides": overrides,
            "batch_size": batch,
            "num_threads": job["threads"],
            "device": "cpu",
            **job["changes"],
        }
    )
    images, labels = images_and_labels(job)
    model = am.create_model(job["model"], size, classes, **overrides)
    device, flops = torch.device("cpu"), model.config.flops
    compute = choose_policy(
        device,
        config.precision,
        config.compile,
        operations=3 * flops * config.batch_size,
        num_steps=STEPS,
    )
    optimizers = build_optimizers(model, config.optimizer)
    said: list[str] = []
    updater = Updater(model, model, optimizers, config, compute, World(), STEPS, said.append)
    targets = F.one_hot(labels, classes).float()
    random = torch.Generator().manual_seed(0)
    settings = torch_settings(
        device,
        compute.precision,
        config.num_threads,
        step_operations=3 * flops * config.batch_size,
    )
    settings.__enter__()  # for as long as this process lives, as in a run
    _KEPT.append(settings)

    def step(number: int) -> float:
        kept = draw_stochastic_depth(model, batch, random)
        loss = updater(number, images, targets, kept, number)[0].loss
        if said:
            raise SystemExit(f"Error: {said[-1]}")
        return loss

    return step, compute.why


def timms(job: dict[str, Any]) -> tuple[Step, str]:
    """The step of timm's train.py with its defaults, and what the job changes."""
    timm = peers.import_timm()
    import torch
    import torch.nn.functional as F
    from timm.optim import create_optimizer_v2
    from timm.utils import dispatch_clip_grad

    model = peers.timms_mixer(job, drop_path_rate=DROP).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    network: Any = torch.compile(model) if job["compile"] else model
    images, labels = images_and_labels(job)

    def step(number: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=job["bfloat16"]):
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    words = ["bfloat16 autocast" if job["bfloat16"] else "float32"]
    return step, ", ".join([*words, *(["compiled"] if job["compile"] else []), timm.__version__])


_KEPT: list[Any] = []


def prepare(job: dict[str, Any]) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    import torch

    torch.manual_seed(0)
    step, why = {"ours": ours, "timm": timms}[job["side"]](job)
    began = time.perf_counter()
    first_loss = step(0)
    first = time.perf_counter() - began
    number = 0

    def timed() -> dict[str, Any]:
        nonlocal number
        number += 1
        loss = step(number)
        if not math.isfinite(loss):
            raise SystemExit(f"Error: the loss is {loss}")
        return {"loss": loss}

    told = {"why": why, "first": first, "first_loss": first_loss}
    return timed, {**told, "versions": peers.versions("torch", "timm", "allmlp")}


if __name__ == "__main__":
    turns.serve(prepare)
