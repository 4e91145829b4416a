"""Paths as users write them, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlp_mixer.errors import UserError


def expand(path: str | Path) -> Path:
    """Returns the path with ~ replaced.

    Raises:
        UserError: whose home is meant cannot be found out.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"~ cannot be resolved in {str(path)!r}", fix="Write it out") from error


_DEEPEST = 100  # of lists within lists in JSON


def parse_json(text: str | bytes) -> Any:
    """Returns what a JSON text means.

    Raises:
        ValueError: it is not JSON, or nested so deeply that whoever follows it would not return.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested more than {_DEEPEST} deep") from error
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        groups = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for group in groups for each in group if isinstance(each, dict | list)]
        if not level:
            return value
    raise ValueError(f"nested more than {_DEEPEST} deep")


def check_place(path: Path) -> None:
    """Refuses the path of an output file that cannot be written there.

    Raises:
        UserError: it is a folder, or its own folder is not there or cannot be written to.
    """
    if path.is_dir():
        raise UserError("the output is a folder", where=path, fix="Give the name of a file")
    if not path.parent.is_dir():
        raise UserError("the output's folder does not exist", where=path.parent, fix="Make it")
    if not os.access(path.parent, os.W_OK):
        raise UserError("the output's folder cannot be written to", where=path.parent)


_FOLDER, _LOCK = ".partial", ".lock"

Content = bytes | Callable[[Path], None]


def write_aside(path: Path, content: Content) -> None:
    """Writes a file under another name, brings it to disk, then renames it: whole or not at all.

    Args:
        path: of the file.
        content: its bytes, or a function that writes them to the path that it is given.
    """
    write_together({path: content})


def write_together(contents: dict[Path, Content]) -> None:
    """Writes several files aside, and renames them only when all are whole, in their order."""
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in contents}
    try:
        for path, content in contents.items():
            _forget_killed(path)
            asides[path].touch()
            mode = asides[path].stat().st_mode  # as the umask wants it, whoever writes
            if callable(content):
                content(asides[path])
            else:
                asides[path].write_bytes(content)
            asides[path].chmod(mode)
            with asides[path].open("rb+") as file:
                os.fsync(file.fileno())
        for path, aside in asides.items():
            os.replace(aside, path)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def aside_folder(
    path: Path, on_left: Callable[[Path], object] = lambda folder: None
) -> Iterator[Path]:
    """Gives a folder beside a path for what will become that file; it is removed in the end.

    Folders that processes left behind when they were killed are removed first. A living process
    holds a lock on its own, which the system takes back from one that ends, however it ends.

    Args:
        path: of the file to be.
        on_left: called with each folder that was left behind before it is removed.
    """
    from filelock import FileLock, Timeout  # a fifth of a second, so only where it is used

    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_FOLDER}"):
        with contextlib.suppress(OSError, Timeout), FileLock(left / _LOCK, timeout=0):
            on_left(left)
            shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_FOLDER, dir=path.parent))
        lock = FileLock(folder / _LOCK, timeout=60)
        try:
            lock.acquire()
            break
        except OSError:  # another process took it, not locked yet, for one left behind
            if folder.exists():
                raise
    try:
        yield folder
    finally:
        lock.release()  # first: some systems keep files that are open
        shutil.rmtree(folder, ignore_errors=True)


def _forget_killed(path: Path) -> None:
    """Removes what writers of this file left behind when they were killed over a minute ago."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 60:
                left.unlink()
