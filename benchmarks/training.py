"""Training images a second of a Mixer on a processor: our default settings against timm's.

    python benchmarks/training.py --model mixer_s16 --output training.json

Each side is a process of its own (timm in an environment that is made on the first call, with the
same torch: benchmarks/peers.py); they take turns, and the medians over the rounds count. A step is
forward, backward, clipping at norm 1 and AdamW on one batch of random pixels; reading images is
left out on all sides (benchmarks/pipeline.py has it). Ours is the step of `mixer train` with
nothing chosen by hand but the GELU: all sides compute timm's, the exact one, but for the row that
has Google's, of which torch's takes longer. timm's step is that of its train.py with its defaults:
float32, eager, its own AdamW; the further rows of timm say how much of the ratio is a setting that
its users can choose too. Compiling is in the first step, which is timed apart.
"""

from __future__ import annotations

import argparse
import math
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import figures
import peers
import torch
import turns

import allmlp as am

BASE = "timm, its defaults (float32, eager)"
CLASSES = 1000


def of_timm(*, compile: bool = False, bfloat16: bool = False) -> tuple[str, dict[str, Any]]:
    return "timm", {"side": "timm", "compile": compile, "bfloat16": bfloat16}


def of_ours(gelu: str = "exact", **changes: str) -> tuple[str, dict[str, Any]]:
    return "ours", {"side": "ours", "gelu": gelu, "changes": changes}


# The side -> its environment and what it is told.
SIDES = {
    BASE: of_timm(),
    "timm, compiled": of_timm(compile=True),
    "timm, bfloat16 autocast": of_timm(bfloat16=True),
    "timm, bfloat16 autocast, compiled": of_timm(compile=True, bfloat16=True),
    "ours, our defaults": of_ours(),
    "ours, not compiled": of_ours(compile="off"),
    "ours, compiled": of_ours(compile="on"),
    "ours, Google's GELU, not compiled": of_ours("tanh", compile="off"),
    "ours, float32, not compiled": of_ours(precision="float32", compile="off"),
    "ours, float32, compiled": of_ours(precision="float32", compile="on"),
}
COLUMNS = {
    "side": "left",
    "how": "left",
    "images/s": "right",
    "least to most": "right",
    "x timm": "right",
    "rounds": "left",
    "first step, s": "right",
    "MB": "right",
    "loss": "right",
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of all sides."""
    overrides = {} if options.num_blocks is None else {"num_blocks": options.num_blocks}
    with torch.device("meta"):
        config = am.create_model(options.model, options.image_size, CLASSES, **overrides).config
    shape = ("patch_size", "hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
    job = {name: getattr(config, name) for name in shape}
    job |= {"model": options.model, "image_size": options.image_size, "num_classes": CLASSES}
    job |= {"batch": options.batch_size, "warm_up": 2}
    print(f"{options.model}, {options.image_size} px, batch {options.batch_size}; ", end="")
    print(config.summary())
    script = Path(__file__).with_name("training_sides.py")
    sides: list[turns.Side] = []
    left_out: dict[str, str] = {}
    with turns.started(script, options.environments, options.threads) as start:
        for name, (environment, told) in SIDES.items():
            if name != BASE and not any(fnmatchcase(name, each) for each in options.sides):
                continue
            try:
                side = start(name, environment, {**job, **told})
                if abs(side.ready["first_loss"] - math.log(CLASSES)) > 0.1:  # of a zero head
                    side.failed = f"its first loss is {side.ready['first_loss']:.3f}"
                    side.stop()
                    raise peers.PeerError(side.failed)
                sides.append(side)
            except peers.PeerError as error:
                left_out[name] = str(error)
                print(f"left out  {name}: {error}", flush=True)
                continue
            first = f"first step {side.ready['first']:.1f} s"
            print(f"ready     {name}: {side.ready['why']}, {first}", flush=True)
        answers = turns.take_turns(sides, options.rounds, options.seconds)
        rows = [figures_of(each, answers, options.batch_size) for each in sides if not each.failed]
    left_out |= {each.name: each.failed for each in sides if each.failed is not None}
    return {
        "model": options.model,
        "image_size": options.image_size,
        "blocks": config.num_blocks,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "rounds": options.rounds,
        "sides": rows,
        "left_out": left_out,
    }


def figures_of(side: turns.Side, answers: dict[str, Any], batch: int) -> dict[str, Any]:
    rates = [batch / each["seconds"] for each in answers[side.name]]
    row: dict[str, Any] = {
        "side": side.name,
        "why": side.ready["why"],
        "images_per_second": figures.spread(rates),
        "rounds": rates,
        "seconds_first_step": side.ready["first"],
        "megabytes": side.memory(),
        "last_loss": answers[side.name][-1]["loss"],
        "idle_share_of_a_core": side.idle / side.waited if side.waited else 0.0,
        "versions": side.ready["versions"],
    }
    if BASE in answers:
        base = [batch / each["seconds"] for each in answers[BASE]]
        row["ratio"] = figures.ratios(rates, base)
    return row


def show(found: dict[str, Any]) -> None:
    rows = []
    for each in found["sides"]:
        rate, ratio = each["images_per_second"], each.get("ratio")
        rows.append(
            {
                "side": each["side"],
                "how": each["why"],
                "images/s": f"{rate['median']:.2f}",
                "least to most": f"{rate['least']:.2f} to {rate['most']:.2f}",
                "x timm": f"{ratio['median']:.2f}" if ratio else "",
                "rounds": f"{ratio['least']:.2f} to {ratio['most']:.2f}" if ratio else "",
                "first step, s": f"{each['seconds_first_step']:.1f}",
                "MB": f"{each['megabytes']:,.0f}",
                "loss": f"{each['last_loss']:.2f}",
            }
        )
    print("\n" + figures.table(COLUMNS, rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="mixer_s16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-blocks", type=int, help="fewer than the model's own, to try it out")
    parser.add_argument("--sides", nargs="+", default=["*"], help="names or patterns, beside timm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=2.0, help="that a turn takes at least")
    parser.add_argument("--environments", type=Path, default=peers.DEFAULT_FOLDER)
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    print(figures.machine(options.threads))
    found = measure(options)
    show(found)
    figures.write(options.output, "training speed", found)
    return 1 if any(name.startswith("ours") for name in found["left_out"]) else 0


if __name__ == "__main__":
    sys.exit(main())
