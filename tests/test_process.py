"""Freed memory is kept, waiting threads sleep soon; what the user has chosen stays."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from allmlp.runtime.process import BLOCK_TIME, SPIN_COUNT, keep_freed_memory

OPENMP = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")

COUNT = """
import resource, sys
import numpy as np
from allmlp.runtime.process import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("not done")
if sys.argv[1] == "model":
    import allmlp as am
    am.create_model("mixer_s16", 16, 2, num_blocks=1, hidden_dim=8)
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
    command = [sys.executable, "-c", COUNT, what]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    if done.stderr.strip() == "not done":
        pytest.skip("another C library than glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_was_freed_is_not_paged_in_anew() -> None:
    kept = page_faults("keep")
    assert kept < 1_000
    assert page_faults("leave") > 10 * max(kept, 100)  # or there was nothing to gain


@pytest.mark.slow
def test_a_process_that_creates_a_model_keeps_it_too() -> None:
    kept = page_faults("keep")
    assert page_faults("model") < 1_000 + kept


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_users_own_choice_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


def openmp_after(code: str, **given: str) -> list[str | None]:
    """What the environment of a new process says of OpenMP after such an import."""
    clean = {name: value for name, value in os.environ.items() if name not in OPENMP}
    code += f"; import os; print([os.environ.get(name) for name in {OPENMP}])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**clean, **given}, capture_output=True, check=True)
    return ast.literal_eval(done.stdout.decode())


def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise() -> None:
    code, spin, block = "import allmlp", str(SPIN_COUNT), str(BLOCK_TIME)
    assert openmp_after(code) == openmp_after(f"{code}.cli.main") == [spin, block, None]
    assert openmp_after(code, GOMP_SPINCOUNT="7") == ["7", block, None]
    assert openmp_after(code, KMP_BLOCKTIME="infinite") == [spin, "infinite", None]
    assert openmp_after(code, OMP_WAIT_POLICY="active") == [None, None, "active"]


def test_nothing_is_set_once_torch_is_there() -> None:
    code = "import sys; sys.modules['torch'] = sys; import allmlp"
    assert openmp_after(code) == [None, None, None]


STREAMS = """
import sys
from allmlp.runtime.process import open_standard_streams
open_standard_streams()
print("nowhere"), print("nowhere", file=sys.stderr)
with open(sys.argv[1], "w") as file:
    file.write(f"{file.fileno() > 2} {sys.stdin.read()!r}")
"""


@pytest.mark.skipif(os.name == "nt", reason="closes streams as a Unix shell does")
def test_closed_standard_streams_are_empty_and_take_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STREAMS, tmp_path / "file"]
    subprocess.run(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command], check=True)
    assert (tmp_path / "file").read_text() == "True ''"
