"""Time until the user sees something: python benchmarks/startup.py --output startup.json

Whole processes, alternated, medians in milliseconds; an empty Python and an import of torch beside
them for scale. The first prediction is that of one photograph with a model whose weights were saved
before: from typing `mixer predict` to the end of the process. "Above empty Python" is what a
command takes beyond starting the interpreter. The files are in the page cache, since every command
ran once before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import figures
import numpy as np
import torch
from PIL import Image

import allmlp as am

EMPTY = "python -c pass"
COLUMNS = {
    "command": "left",
    "median ms": "right",
    "least": "right",
    "most": "right",
    "above empty Python": "right",
}


def commands(name: str, size: int, num_blocks: int | None, folder: Path) -> dict[str, list[str]]:
    """Writes a model and a photograph; returns what is run."""
    overrides = {} if num_blocks is None else {"num_blocks": num_blocks}
    torch.manual_seed(0)
    model = am.create_model(name, size, 1000, **overrides)
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight, std=model.config.hidden_dim**-0.5)
    model.class_names = [f"class {index}" for index in range(1000)]
    weights, photo = folder / "model.safetensors", folder / "photo.jpg"
    am.save_model(model, weights)
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(small).resize((640, 480)).save(photo, quality=90)
    python, mixer = [sys.executable, "-c"], [sys.executable, "-m", "allmlp"]
    load = f"import allmlp as am; am.load_model({str(weights)!r}, quiet=True)"
    return {
        EMPTY: [*python, "pass"],
        "import allmlp": [*python, "import allmlp"],
        "import torch": [*python, "import torch"],
        "mixer --help": [*mixer, "--help"],
        "mixer train --help": [*mixer, "train", "--help"],
        "mixer models": [*mixer, "models"],
        f"load_model, {name}": [*python, load],
        f"mixer predict, {name}, one photograph": [*mixer, "predict", str(weights), str(photo)],
    }


def milliseconds(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lasted = 1000 * (time.perf_counter() - started)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return lasted


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="mixer_b16", help="of the first prediction")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-blocks", type=int, help="fewer than the model's own, to try it out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size, blocks = options.image_size, options.num_blocks
        chosen = commands(options.model, size, blocks, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in chosen}
        for turn in range(options.rounds + 1):  # the first is a warm-up
            for name in sorted(chosen, reverse=bool(turn % 2)):
                lasted = milliseconds(chosen[name])
                if turn:
                    times[name].append(lasted)
    found, rows = {}, []
    for name, each in times.items():
        above = [one - empty for one, empty in zip(each, times[EMPTY], strict=True)]
        found[name] = figures.spread(each) | {"above": figures.spread(above), "rounds": each}
        rows.append(
            {
                "command": f"`{name}`",
                "median ms": f"{found[name]['median']:,.0f}",
                "least": f"{min(each):,.0f}",
                "most": f"{max(each):,.0f}",
                "above empty Python": f"{found[name]['above']['median']:,.0f}",
            }
        )
    print(f"{figures.machine(torch.get_num_threads())}; {options.rounds} rounds\n")
    print(figures.table(COLUMNS, rows))
    figures.write(options.output, "startup", {"milliseconds": found})


if __name__ == "__main__":
    main()
