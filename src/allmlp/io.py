"""Paths, JSON, atomic writes, checks of output paths, and whether a host answers."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from allmlp.errors import UserError

STANDARD_OUTPUT = "-"  # as the name of an output


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


def check_output_file(path: Path, *, overwrite: bool, parents: bool = False) -> None:
    """Refuses the path of an output file that cannot or may not be written.

    Args:
        path: of the file.
        overwrite: it may be there already.
        parents: its folder need not be there: the caller makes it.

    Raises:
        UserError: it is a folder or is there already, or its own folder is not there or cannot be
            written to.
    """
    if path.is_dir():
        raise UserError("the output is a folder", where=path, fix="Give the name of a file")
    if not (parents or path.parent.is_dir()):
        raise UserError("the output's folder does not exist", where=path.parent, fix="Make it")
    _check_writable(path.parent)
    if not overwrite and os.path.lexists(path):
        raise UserError("the output is there already", where=path, fix="Add --overwrite")


def check_output_folder(
    folder: Path, names: Iterable[str] = (), *, overwrite: bool = False
) -> None:
    """Refuses an output folder that cannot be written to, or has one of the files already.

    Raises:
        UserError: it is a file or standard output, cannot be written to, or a file is there.
    """
    if str(folder) == STANDARD_OUTPUT:
        what = "a folder is written, which cannot go to standard output"
        raise UserError(what, where="-", fix="Give the name of a folder")
    if os.path.lexists(folder) and not folder.is_dir():
        what = "the output is a file, it must be a folder"
        raise UserError(what, where=folder, fix="Give another name")
    _check_writable(folder)
    for name in names:
        if not overwrite and os.path.lexists(folder / name):
            fix = "Add --overwrite, or give another folder"
            raise UserError("the output is there already", where=folder / name, fix=fix)


def _check_writable(folder: Path) -> None:
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError("the output's folder cannot be written to", where=there)


def check_not_inputs(
    outputs: Iterable[Path], inputs: Iterable[str | Path], images: Iterable[str] = ()
) -> None:
    """Refuses outputs that are, or lie in, what is read: by whatever name or link.

    Args:
        outputs: files and folders, there or not.
        inputs: files and folders; those that are not there do not matter.
        images: more files, perhaps a million: only an output that is there can be one of them.

    Raises:
        UserError: names the output and the input.
    """
    held: dict[tuple[int, int], Path] = {}
    replaces = False
    for output in outputs:
        real = Path(os.path.realpath(output))
        replaces |= real.exists()
        for each in (real, *real.parents):
            if found := _identity(each):
                held.setdefault(found, output)
    for each in chain(inputs, images if replaces else ()):
        output = held.get(_identity(each) or (-1, -1))
        if output is not None:
            what = "the output is, or lies in, what is read: "
            raise UserError(f"{what}{each}", where=output, fix="Give a place outside of it")


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Puts the path into an error of the system that names none, as that of a full disk does."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror is not None:
            error.filename = str(path)
        raise


_FOLDER, _LOCK = ".partial", ".lock"
_FORGOTTEN = 24 * 3600.0  # seconds without a change after which nobody writes a file any more

Content = bytes | Callable[[Path], None]


def atomic_write(path: Path, content: Content) -> None:
    """Writes a file under another name, brings it to disk, then renames it: whole or not at all.

    Args:
        path: of the file.
        content: its bytes, or a function that writes them to the path that it is given.
    """
    atomic_write_all({path: content})


def atomic_write_all(contents: dict[Path, Content]) -> None:
    """Writes several files aside, and renames them only when all are whole, in their order."""
    asides = {path: partial_path(path) for path in contents}
    try:
        for path, content in contents.items():
            remove_stale(path.parent, path.name)
            with path_in_errors(path):
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


def partial_path(path: Path, process: int | None = None) -> Path:
    """Returns what a process of this machine, or this one, calls a file while it writes it."""
    return path.with_name(f".{path.name}.{_machine()}-{process or os.getpid()}.partial")


def _machine() -> str:
    """This machine, or container of it: where the numbers of processes mean something."""
    numbers = ""
    with contextlib.suppress(OSError):
        numbers = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{platform.node()}{numbers}'.encode()):08x}"


def remove_stale(folder: Path, name: str = "") -> None:
    """Removes the partial files of processes that were killed, and leaves those of living ones.

    Args:
        folder: where they lie.
        name: of the file that they were to be; any where it is empty.
    """
    start = f".{glob.escape(name)}." if name else "."
    for left in folder.glob(f"{start}*.partial"):
        machine, _, process = left.name.removesuffix(".partial").rpartition(".")[2].partition("-")
        with contextlib.suppress(OSError):
            is_dead = machine == _machine() and process.isdecimal() and not _lives(int(process))
            if is_dead or time.time() - left.stat().st_mtime > _FORGOTTEN:
                left.unlink()


def _lives(process: int) -> bool:
    if sys.platform == "win32":  # where a signal, even of number 0, would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def fsync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk."""
    if sys.platform == "win32":  # which cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staging_folder(
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


def is_reachable(endpoint: str) -> bool:
    """Whether a host answers; True behind a proxy, where that cannot be known.

    Asked before the libraries are, which retry for half a minute.
    """
    parts = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies() or parts.hostname is None:
        return True
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname, port), timeout=5.0).close()
    except OSError:
        return False
    return True
