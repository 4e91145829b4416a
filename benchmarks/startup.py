"""Time until the user sees something: python benchmarks/startup.py

Whole processes, alternated, medians in milliseconds; an empty Python beside them for scale.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import mlp_mixer": [sys.executable, "-c", "import mlp_mixer"],
    "mixer --help": [sys.executable, "-m", "mlp_mixer", "--help"],
    "mixer train --help": [sys.executable, "-m", "mlp_mixer", "train", "--help"],
    "mixer models": [sys.executable, "-m", "mlp_mixer", "models"],
}


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(15):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            times[name].append(1000 * (time.perf_counter() - started))
    print("| command | median ms | least | most |\n| --- | ---: | ---: | ---: |")
    for name, each in times.items():
        middle = statistics.median(each)
        print(f"| `{name}` | {middle:.0f} | {min(each):.0f} | {max(each):.0f} |")


if __name__ == "__main__":
    main()
