"""What waiting threads cost on an idle machine and on a shared one: spin counts of torch's OpenMP.

    python benchmarks/shared_machine.py --output shared_machine.json

Each setting is a process of its own, with GOMP_SPINCOUNT (or one thread) set before torch is
imported. They take turns, alone and beside a process that keeps one core busy: first all settings
with one kind of work, then the next. "ours" is the product as it is; "libgomp" and the numbers take
all of torch's threads for small batches too, as before that rule. The table has the median of
images per second over the rounds, and its ratio to the first setting in the same round.

Works: "train", the step of the recipe cifar10 (batch 128); "recipe", the same with its loader's
workers, on the digits (not by default); the others are predictions as `mixer predict` computes
them, from pixels in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LIBGOMP, OURS, ONE = "libgomp", "ours", "1 thread"
SETTINGS = (LIBGOMP, OURS, "0", "1000", "3000", "10000", "30000", "100000", ONE)
WORKS = ("train", "B/16, batch 8", "B/16, batch 1", "digits, batch 64", "recipe")
BESIDE = ("nothing", "a busy process")
STEPS = 8  # of "recipe" in a turn

Rate = Callable[[float], float]  # about so many seconds -> images per second
Rates = dict[tuple[str, str, str], list[float]]  # work, beside, setting -> of each round


def repeated(run: Callable[[], int], seconds: float) -> float:
    run()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        done += run()
    return done / (time.perf_counter() - began)


def training(work: str) -> Rate:
    from pipeline import Parts

    import allmlp as am
    from allmlp.runtime.device import torch_settings

    values = {"data.source": "digits", "device": "cpu", "batch_size": 128}
    config = am.recipe("cifar10").with_values(values)
    parts = Parts(config, STEPS)

    def step() -> int:
        parts.step(0, parts.same)
        return config.batch_size

    def rate(seconds: float) -> float:
        with torch_settings(
            parts.device,
            parts.compute.precision,
            config.num_threads,
            step_operations=3 * parts.model.config.flops * config.batch_size,
        ):
            return parts.together() if work == "recipe" else repeated(step, seconds)

    return rate


def predicting(work: str, setting: str) -> Rate:
    import torch

    import allmlp as am
    from allmlp.deploy.rows import choose_columns, row_values
    from allmlp.evaluation.predictor import Predictor
    from allmlp.runtime.device import step_threads, torch_settings

    batch, small = int(work.rpartition(" ")[2]), am.recipe("digits").model
    if work.startswith("B/16"):
        model = am.create_model("mixer_b16", 224, 10)
    else:
        model = am.create_model(small.name, small.image_size, 10, **small.overrides)
    model.class_names = [str(number) for number in range(10)]
    predictor = Predictor(model, precision="auto")
    values = row_values(predictor, choose_columns(model))
    pixels = torch.randint(0, 256, (batch, 3, *model.config.image_size), dtype=torch.uint8)

    def run() -> int:
        with step_threads(predictor.device, model.config.flops * batch):
            values(pixels)
        return batch

    def rate(seconds: float) -> float:
        # All threads for small batches too; the precision named here leaves the products alone.
        fixed = torch_settings(predictor.device, "bfloat16", fixed=True)
        with contextlib.nullcontext() if setting == OURS else fixed:
            return repeated(run, seconds)

    return rate


def serve(setting: str) -> None:
    """Runs in the process of a setting: answers (work, seconds) with images per second."""
    if setting == LIBGOMP:
        import torch  # noqa: F401  (before allmlp, which would set a spin count)
    import allmlp  # noqa: F401  (before whatever imports torch)

    known: dict[str, Rate] = {}
    for line in sys.stdin:
        work, seconds = json.loads(line)
        if work not in known:
            trains = work in ("train", "recipe")
            known[work] = training(work) if trains else predicting(work, setting)
        print(json.dumps(known[work](seconds)), flush=True)


def started(setting: str) -> subprocess.Popen[str]:
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    if setting == ONE:
        environment["OMP_NUM_THREADS"] = "1"
    elif setting not in (LIBGOMP, OURS):
        environment["GOMP_SPINCOUNT"] = setting
    command = [sys.executable, __file__, "--serve", setting]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


def asked(process: subprocess.Popen[str], work: str, seconds: float) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps([work, seconds]), file=process.stdin, flush=True)
    return float(process.stdout.readline())


@contextlib.contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    code = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[*WORKS[:2], WORKS[3]])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    rates: Rates = {}
    with contextlib.ExitStack() as stack:
        sides = {name: started(name) for name in options.settings}
        for process in sides.values():
            stack.callback(process.kill)
        for work in options.works:
            for process in sides.values():  # build and warm up
                asked(process, work, 0.1)
            for count in range(options.rounds):
                for beside in BESIDE:
                    with busy_process(beside != BESIDE[0]):
                        for name in sorted(sides, reverse=bool(count % 2)):
                            found = asked(sides[name], work, options.seconds)
                            rates.setdefault((work, beside, name), []).append(found)
            print(f"{work} done", file=sys.stderr)
    report(rates, options)


def report(rates: Rates, options: argparse.Namespace) -> None:
    import figures

    rows, shown = [], []
    for work, beside, name in itertools.product(options.works, BESIDE, options.settings):
        found, base = (rates[work, beside, each] for each in (name, options.settings[0]))
        speed, ratio = figures.spread(found), figures.ratios(found, base)
        row = {"work": work, "beside": beside, "setting": name}
        rows.append({**row, "images_per_second": speed, "ratio": ratio})
        cells = {"images/s": f"{speed['median']:.1f}", "ratio": f"{ratio['median']:.2f}"}
        spread = f"{ratio['least']:.2f} to {ratio['most']:.2f}"
        shown.append({**row, **cells, "least to most": spread})
    columns = {"work": "left", "beside": "left", "setting": "left"}
    columns |= {"images/s": "right", "ratio": "right", "least to most": "right"}
    print(figures.machine(os.cpu_count() or 1))
    print(figures.table(columns, shown))
    figures.write(options.output, "shared_machine", {"rows": rows})


if __name__ == "__main__":
    main()
