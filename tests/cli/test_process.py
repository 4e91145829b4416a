"""The command keeps freed memory; what the user has chosen stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mlp_mixer.cli.process import keep_freed_memory

COUNT = """
import resource, sys
import numpy as np
from mlp_mixer.cli.process import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("not done")
def use():
    blocks = [np.ones(3_000_000, np.float32) for _ in range(4)]  # 48 MB
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(what: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, what], env=clean, capture_output=True, text=True, check=False
    )
    if done.stderr.strip() == "not done":
        pytest.skip("another C library than glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_was_freed_is_not_paged_in_anew() -> None:
    kept = page_faults("keep")
    assert kept < 1_000
    assert page_faults("leave") > 10 * max(kept, 100)  # or there was nothing to gain


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_users_own_choice_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()
