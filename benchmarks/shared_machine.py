"""What waiting threads cost on an idle machine and on a shared one: spin counts of torch's OpenMP.

    python benchmarks/shared_machine.py --output shared_machine.json

Each measurement is a process of its own with GOMP_SPINCOUNT (or one thread) set before torch is
imported, alone or beside a process that keeps one core busy. Settings take turns within a round;
the table has the median of images per second, and its ratio to the default of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BUSY = "while True: pass"
DEFAULT = "default"


def measured(work: str, seconds: float) -> float:
    """Runs in the child: returns the images per second of a kind of work."""
    import torch

    import mlp_mixer as mm

    if work == "train":
        config = mm.recipe("cifar10")
        model = mm.create_model("mixer_s16", 32, 10, **config.model.overrides)
        optimizer = torch.optim.AdamW(model.parameters())
        images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))

        def run() -> int:
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            return len(images)

    else:
        from mlp_mixer.models.inference import Inference

        name, size, batch = {
            "B/16, batch 8": ("mixer_b16", 224, 8),
            "B/16, batch 1": ("mixer_b16", 224, 1),
            "small, batch 64": ("mixer_s16", 32, 64),
        }[work]
        small = {"patch_size": 8, "num_blocks": 4, "hidden_dim": 64} if size == 32 else {}
        model = mm.create_model(name, size, 10, **small).eval()
        images = torch.randn(batch, 3, size, size)
        compute = Inference(model, "float32")

        def run() -> int:
            compute.logits(images)
            return len(images)

    for _ in range(3):
        run()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        done += run()
    return done / (time.perf_counter() - began)


def in_process(work: str, setting: str, busy: bool, seconds: float) -> float:
    """Measures in a new process, beside a busy one or alone."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    if setting == "1 thread":
        environment["OMP_NUM_THREADS"] = "1"
    elif setting != DEFAULT:
        environment["GOMP_SPINCOUNT"] = setting
    neighbour = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        command = [sys.executable, __file__, "--child", work, "--seconds", str(seconds)]
        found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return float(found.stdout)
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--works", nargs="+", default=["train", "B/16, batch 8", "small, batch 64"])
    parser.add_argument(
        "--settings",
        nargs="+",
        default=[DEFAULT, "0", "1000", "3000", "10000", "30000", "100000", "1 thread"],
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(measured(asked.child, asked.seconds))
        return
    import figures

    rows: list[dict[str, Any]] = []
    for work in asked.works:
        for busy in (False, True):
            speeds: dict[str, list[float]] = {name: [] for name in asked.settings}
            for _ in range(asked.rounds):
                for name in asked.settings:
                    speeds[name].append(in_process(work, name, busy, asked.seconds))
            base = speeds[asked.settings[0]]
            for name, found in speeds.items():
                row = {"work": work, "beside": "a busy process" if busy else "nothing"}
                row |= {"setting": name, "images_per_second": figures.spread(found)}
                rows.append({**row, "ratio": figures.ratios(found, base)})
                print(json.dumps(rows[-1]), flush=True)
    columns = {"work": "left", "beside": "left", "setting": "left"}
    columns |= {"images/s": "right", "ratio": "right", "least": "right", "most": "right"}
    shown = [
        {
            **{name: row[name] for name in ("work", "beside", "setting")},
            "images/s": f"{row['images_per_second']['median']:.1f}",
            "ratio": f"{row['ratio']['median']:.2f}",
            "least": f"{row['ratio']['least']:.2f}",
            "most": f"{row['ratio']['most']:.2f}",
        }
        for row in rows
    ]
    print(figures.machine(os.cpu_count() or 1))
    print(figures.table(columns, shown))
    figures.write(asked.output, "shared_machine", {"rows": rows})


if __name__ == "__main__":
    main()
