"""Paths, JSON, atomic writes, output path checks and host reachability."""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import hashlib
import io
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
from typing import TYPE_CHECKING, Any

from allmlp.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock

STANDARD_OUTPUT = "-"  # output name


def expand(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"~ cannot be resolved in {str(path)!r}", fix="Write it out") from error


_MAX_DEPTH = 100  # nesting depth of JSON


def parse_json(text: str | bytes) -> Any:
    """Parses JSON; raises ValueError also if it is nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep") from error
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        groups = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for group in groups for item in group if isinstance(item, dict | list)]
        if not level:
            return value
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def read_json(path: Path, wrong: str = "not JSON", fix: str | None = None) -> Any:
    """Reads a JSON file; raises UserError, in the words of `wrong`, if it cannot be parsed."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=path, fix=fix) from error
    except ValueError as error:
        raise UserError(f"{wrong}: {str(error)[:200]}", where=path, fix=fix) from error


def check_output_file(path: Path, *, overwrite: bool, parents: bool = False) -> None:
    """Checks that a file can and may be written; with `parents` its folder need not exist."""
    if path.is_dir():
        raise UserError("the output is a folder", where=path, fix="Give the name of a file")
    if not (parents or path.parent.is_dir()):
        raise UserError("the output's folder does not exist", where=path.parent, fix="Create it")
    _check_writable(path.parent)
    if not overwrite:
        _check_free(path)


def check_output_folder(
    folder: Path, names: Iterable[str] = (), *, overwrite: bool = False
) -> None:
    """Checks that a folder is writable and contains none of these files yet."""
    if str(folder) == STANDARD_OUTPUT:
        what = "the output is a folder, which cannot go to standard output"
        raise UserError(what, where="-", fix="Give the name of a folder")
    if os.path.lexists(folder) and not folder.is_dir():
        what = "the output is a file, it must be a folder"
        raise UserError(what, where=folder, fix="Give another name")
    _check_writable(folder)
    if not overwrite:
        for name in names:
            _check_free(folder / name)


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError("the output's folder cannot be written to", where=existing)


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        fix = "Set overwrite, or give another name"
        raise UserError("the output exists already", where=path, fix=fix, code="exists")


def check_not_inputs(
    outputs: Iterable[Path], inputs: Iterable[str | Path], images: Iterable[str] = ()
) -> None:
    """Checks that no output is an input or lies inside one, links resolved; `images`, possibly
    millions, are compared with existing outputs only."""
    held: dict[tuple[int, int], Path] = {}
    replaces = False
    for output in outputs:
        real = Path(os.path.realpath(output))
        replaces |= real.exists()
        for path in (real, *real.parents):
            if found := _identity(path):
                held.setdefault(found, output)
    for read in chain(inputs, images if replaces else ()):
        output = held.get(_identity(read) or (-1, -1))
        if output is not None:
            what = f"the output is, or lies in, an input that is read: {read}"
            raise UserError(what, where=output, fix="Give a place outside of it")


def made_folder(
    output: str | None,
    names: Iterable[str],
    *,
    overwrite: bool,
    inputs: Iterable[str | Path],
    images: Iterable[str] = (),
) -> Path | None:
    """Makes the folder that these files are written to, if one is named and none is an input."""
    if output is None:
        return None
    folder, names = expand(output), list(names)
    check_output_folder(folder, names, overwrite=overwrite)
    check_not_inputs([folder, *map(folder.joinpath, names)], inputs, images)
    folder.mkdir(parents=True, exist_ok=True)  # fail before the work
    return folder


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Adds the path to system errors that lack one, such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror is not None:
            error.filename = str(path)
        raise


_PARTIAL, _LOCK = ".partial", ".lock"
_STALE = 24 * 3600.0  # seconds unchanged, after which a partial file is abandoned

Content = bytes | str | Callable[[Path], None]


def atomic_write(path: Path, content: Content) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it."""
    atomic_write_all({path: content})


def atomic_write_all(contents: dict[Path, Content]) -> None:
    """Writes several files and, once all are complete, renames them in order."""
    partial = {path: partial_path(path) for path in contents}
    try:
        for path, content in contents.items():
            remove_stale(path.parent, path.name)
            with path_in_errors(path):
                partial[path].touch()
                mode = partial[path].stat().st_mode  # from the umask, whatever the writer sets
                if callable(content):
                    content(partial[path])
                elif isinstance(content, bytes):
                    partial[path].write_bytes(content)
                else:  # file names need not be valid text
                    partial[path].write_bytes(content.encode(errors="surrogateescape"))
                partial[path].chmod(mode)
                with partial[path].open("rb+") as file:
                    os.fsync(file.fileno())
        for path, written in partial.items():
            os.replace(written, path)
    finally:
        for written in partial.values():
            written.unlink(missing_ok=True)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def partial_path(path: Path, process: int | None = None) -> Path:
    return path.with_name(f".{path.name}.{machine()}-{process or os.getpid()}{_PARTIAL}")


def machine() -> str:
    """Identifies the machine or container: the scope of a process id."""
    numbers = ""
    with contextlib.suppress(OSError):
        numbers = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{platform.node()}{numbers}'.encode()):08x}"


def remove_stale(folder: Path, name: str = "") -> None:
    """Removes partial files (of one name) left in a folder by killed processes."""
    start = f".{glob.escape(name)}." if name else "."
    for left in folder.glob(f"{start}*{_PARTIAL}"):
        host, _, process = left.name.removesuffix(_PARTIAL).rpartition(".")[2].partition("-")
        with contextlib.suppress(OSError):
            is_dead = host == machine() and process.isdecimal() and not process_lives(int(process))
            if is_dead or time.time() - left.stat().st_mtime > _STALE:
                left.unlink()


def process_lives(process: int) -> bool:
    """Returns whether a process is running on this machine; a zombie is not."""
    if sys.platform == "win32":  # even signal 0 would kill it
        return True
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
        return text.rpartition(")")[2].split()[0] not in ("Z", "X")
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # owned by another user
        return True
    return True


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    if sys.platform == "win32":  # cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locked(path: Path, timeout: float = 0.0) -> FileLock | None:
    """Returns the lock of a file, or raises Timeout; None on a file system without locks."""
    from filelock import FileLock  # takes 0.2 s to import

    # A file that stands for the lock would be left behind by a killed process.
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            return None
        raise
    return lock


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder next to a path, for files to be renamed to it; removes those that
    killed processes left. A live process holds a lock, which ends with it."""
    from filelock import Timeout  # takes 0.2 s to import

    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_PARTIAL}"):
        with contextlib.suppress(OSError, Timeout):
            lock = locked(left / _LOCK)
            if lock is None:  # its process may be at work
                continue
            shutil.rmtree(left, ignore_errors=True)
            lock.release()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent))
        try:
            lock = locked(folder / _LOCK, timeout=60)
            break
        except OSError:  # another process removed it before it was locked
            if folder.exists():
                raise
    try:
        yield folder
    finally:
        if lock is not None:
            lock.release()  # first: some systems cannot delete open files
        shutil.rmtree(folder, ignore_errors=True)


def is_reachable(endpoint: str) -> bool:
    """Returns whether a host answers (clients retry for half a minute); True behind a proxy."""
    parts = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies() or parts.hostname is None:
        return True
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname, port), timeout=5.0).close()
    except OSError:
        return False
    return True
