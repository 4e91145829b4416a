"""`mixer data pack` killed or failing while it puts its files in place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from allmlp.data.sources import open_source, open_splits
from allmlp.data.sources.packed import pack_splits
from allmlp.errors import UserError

KILLS = """
import os, signal, sys
from pathlib import Path
from allmlp.data.sources import open_splits
from allmlp.data.sources.packed import pack_splits

source, target, instants = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
splits, replace = open_splits(source), os.replace
for instant in range(instants):
    if (number := os.fork()) == 0:
        left = iter(range(instant))

        def replace_or_end(*paths):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = replace_or_end
        pack_splits(splits, target / str(instant), shard_bytes=30_000)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix has them")
@pytest.mark.slow
def test_a_kill_among_the_renames(class_folder: Path, tmp_path: Path):
    """A fragment is never taken for the data set, and the same command starts over."""
    splits = open_splits(str(class_folder))
    pack_splits(splits, tmp_path / "whole", shard_bytes=30_000)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) > 4
    arguments = [str(class_folder), str(tmp_path), str(len(whole))]
    subprocess.run([sys.executable, "-c", KILLS, *arguments], check=True)
    for instant in range(len(whole)):
        folder = tmp_path / str(instant)
        assert len(list(folder.glob("*.arrow"))) == instant
        with pytest.raises(UserError, match="data pack"):
            open_splits(str(folder))
        (folder / "notes.txt").write_text("mine")
        pack_splits(splits, folder, shard_bytes=30_000)
        (folder / "notes.txt").unlink()
        found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}
        assert found == whole


def test_a_failed_rename_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, replace = open_source("digits:test[:9]"), os.replace

    def fails(source: Path, target: Path) -> None:
        if target.name == "packed.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="No space left"):
            pack_splits({"train": source, "test": source}, tmp_path / "new")
    assert not list(tmp_path.iterdir())
    pack_splits({"train": source}, tmp_path / "new")
    assert len(open_source(str(tmp_path / "new"))) == 9
