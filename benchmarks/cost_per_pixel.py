"""What a pixel costs from 224 to 896 pixels: the paper's claim that a Mixer is linear in them.

    python benchmarks/cost_per_pixel.py --output cost_per_pixel.json

One architecture at each size, its token-mixing MLPs with the same hidden width D_S (section 2 of
the paper: D_S is independent of the number of patches, so that the cost is linear in it). Weights
are random, images are noise; batches are chosen so that each has about as many pixels. All sizes
lie in this process and take turns; the median over the rounds counts. What is timed is what `mixer
predict` does with a decoded batch, up to the logits. "Flatness" is the dearest size's nanoseconds a
pixel over the cheapest's. The operations a pixel, which all but the head and the mean share, are
printed beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import figures
import torch

import allmlp as am
from allmlp.evaluation.predictor import Predictor

COLUMNS = {
    "size": "left",
    "batch": "right",
    "patches": "right",
    "images/s": "right",
    "ns a pixel": "right",
    "least to most": "right",
    "x the first size": "right",
    "operations a pixel": "right",
}


def model_of(name: str, size: int, tokens_mlp_dim: int, blocks: int) -> am.ImageClassifier:
    torch.manual_seed(0)
    model = am.create_model(
        name, size, 1000, tokens_mlp_dim=tokens_mlp_dim, num_blocks=blocks
    ).eval()
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight, std=model.config.hidden_dim**-0.5)
    model.class_names = [f"class {index}" for index in range(1000)]
    return model


def measure(precision: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of all sizes in one precision."""
    with torch.device("meta"):
        own: Any = am.create_model(options.model, 224, 1000).config
    blocks = options.num_blocks or own.num_blocks
    computed: str | None = None
    sides: dict[int, tuple[Any, torch.Tensor]] = {}
    random = torch.Generator().manual_seed(0)
    for size in options.sizes:
        batch = max(1, round(options.batch_size * (options.sizes[0] / size) ** 2))
        model = model_of(options.model, size, own.tokens_mlp_dim, blocks)
        pixels = torch.randint(0, 256, (batch, size, size, 3), generator=random).byte()
        predictor = Predictor(model, precision=precision or "auto")
        sides[size] = (predictor, pixels.permute(0, 3, 1, 2))
        computed = predictor.precision
    times: dict[int, list[float]] = {size: [] for size in sides}
    for turn in range(options.rounds + 1):  # the first is a warm-up
        for size in sorted(sides, reverse=bool(turn % 2)):
            began = time.perf_counter()
            predictor, pixels = sides[size]
            logits = [predictor.logits(pixels) for _ in range(options.runs)]
            lasted = (time.perf_counter() - began) / options.runs
            assert logits[0].isfinite().all()
            if turn:
                times[size].append(lasted)
    of_pixels = {
        size: [1e9 * each / len(pixels) / size**2 for each in times[size]]
        for size, (_, pixels) in sides.items()
    }
    rows = []
    for size, (ready, pixels) in sides.items():
        batch, nanoseconds, config = len(pixels), of_pixels[size], ready.model.config
        rows.append(
            {
                "size": size,
                "batch_size": batch,
                "patches": config.tokens[0],
                "images_per_second": figures.spread([batch / each for each in times[size]]),
                "nanoseconds_per_pixel": figures.spread(nanoseconds),
                "ratio": figures.ratios(nanoseconds, of_pixels[options.sizes[0]]),
                "flops_per_pixel": config.flops / size**2,
                "rounds": nanoseconds,
            }
        )
    medians = [row["nanoseconds_per_pixel"]["median"] for row in rows]
    return {
        "model": options.model,
        "tokens_mlp_dim": own.tokens_mlp_dim,
        "blocks": blocks,
        "asked": precision or "as `mixer predict` comes",
        "precision": computed,
        "flatness": max(medians) / min(medians),
        "sizes": rows,
    }


def show(found: dict[str, Any]) -> None:
    rows = []
    for each in found["sizes"]:
        pixel = each["nanoseconds_per_pixel"]
        rows.append(
            {
                "size": f"{each['size']} px",
                "batch": str(each["batch_size"]),
                "patches": f"{each['patches']:,}",
                "images/s": f"{each['images_per_second']['median']:.3g}",
                "ns a pixel": f"{pixel['median']:.0f}",
                "least to most": f"{pixel['least']:.0f} to {pixel['most']:.0f}",
                "x the first size": f"{each['ratio']['median']:.2f}",
                "operations a pixel": f"{each['flops_per_pixel']:,.0f}",
            }
        )
    print(f"\n{found['model']}, D_S {found['tokens_mlp_dim']}, {found['blocks']} layers, ", end="")
    print(f"{found['asked']}: {found['precision']}\n")
    print(figures.table(COLUMNS, rows))
    print(f"\nflatness, dearest / cheapest: {found['flatness']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="mixer_b16")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 320, 448, 640, 896])
    parser.add_argument("--batch-size", type=int, default=16, help="of the first size")
    parser.add_argument("--precisions", nargs="+", default=["default", "float32", "bfloat16"])
    parser.add_argument("--num-blocks", type=int, help="fewer than the model's own, to try it out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=1, help="of each size in a round")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(figures.machine(options.threads))
    found = []
    for name in options.precisions:
        found.append(measure(None if name == "default" else name, options))
        show(found[-1])
    figures.write(options.output, "cost per pixel", {"threads": options.threads, "parts": found})


if __name__ == "__main__":
    main()
