"""`mixer data pack` killed or failing while it puts its files in place."""

import os
import signal
import sys
from pathlib import Path

import pytest

from allmlp.data.source import Source
from allmlp.data.sources import open_source, open_splits
from allmlp.data.sources.packed import pack_splits
from allmlp.errors import UserError


def kill_pack(splits: dict[str, Source], target: Path, instant: int) -> None:
    """Packs in a child that is killed instead of the rename of this number."""
    if number := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL
        return
    left, replace = iter(range(instant)), os.replace

    def replace_or_end(*paths: Path) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    try:
        os.replace = replace_or_end
        pack_splits(splits, target, shard_bytes=30_000)
    finally:
        os._exit(1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix has them")
@pytest.mark.slow
def test_a_kill_among_the_renames(class_folder: Path, tmp_path: Path):
    """A fragment is never taken for the data set, and the same command starts over."""
    splits = open_splits(str(class_folder))
    pack_splits(splits, tmp_path / "whole", shard_bytes=30_000)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) > 4
    for instant in range(len(whole)):
        folder = tmp_path / str(instant)
        kill_pack(splits, folder, instant)
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
