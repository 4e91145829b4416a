"""`mixer serve` as a process of its own, on a port that the system chooses."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def serving(model: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs the server for the block; gives its address, from the line that it prints."""
    command = [sys.executable, "-m", "allmlp", "serve", str(model), "--port", "0", *flags]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"serving  (http://\S+)  \(.+ classes\); Ctrl-C ends it\n", line)
        if found is None:
            process.kill()
            raise AssertionError(
                f"no line of a server that is ready: {line}{process.communicate()}"
            )
        yield found[1], process
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(ValueError):  # the block has read all that it said
            process.communicate(timeout=60)
