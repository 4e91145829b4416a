"""Files from the web to a cache: shown, resumed, checked, and never half there.

A download goes to NAME.partial beside its place and is renamed when its size and sha256 are right.
What was got before an interruption is kept and continued (HTTP range), unless the file on the
server has changed since. The sha256 of a file without a published one is recorded at its first
download, so that a later change on the server or on the disk does not go unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from allmlp.console import Reporter
from allmlp.errors import UserError
from allmlp.io import expand, parse_json

ATTEMPTS = 4  # each goes on where the last one stopped
PATIENCE = 30.0  # seconds without a byte
PAUSE = 1.0  # seconds before the next attempt; doubled each time
_BLOCK = 2**20
_MEBIBYTE = 2**20


def cache_folder() -> Path:
    """Returns where downloads are kept: MIXER_CACHE, else allmlp in the user's cache folder."""
    if chosen := os.environ.get("MIXER_CACHE"):
        return expand(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(os.path.expanduser(base)) / "allmlp"
    except RuntimeError:  # a user without a home, as in containers
        return Path(tempfile.gettempdir()) / "allmlp"


def is_offline() -> bool:
    """Says whether HF_HUB_OFFLINE forbids to use the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


@dataclass(frozen=True)
class Published:
    """What is known of a file before it is there.

    Attributes:
        name: of the checkpoint, for messages.
        url: of the file.
        mebibytes: its size, to two decimals; None where it is not published.
        sha256: its first digits or all of them; None where none are published.
    """

    name: str
    url: str
    mebibytes: float | None = None
    sha256: str | None = None


def cached(published: Published, path: Path, report: Reporter) -> Path:
    """Returns `path` once the whole, checked file lies there; downloads it where it does not.

    Args:
        published: what to fetch, and how to know it.
        path: its place in the cache.
        report: says what is fetched and shows a bar.

    Raises:
        UserError: no network, no such file, no room, or a file that is not the published one.
    """
    if path.is_file():
        _check_file(published, path)
        return path
    if is_offline():
        raise _by_hand(published, path, "HF_HUB_OFFLINE forbids downloads")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # another process may be at the same file
            if not path.is_file():
                _download(published, path, report)
    except OSError as error:
        what = f"cannot write to the cache: {error.strerror or error}"
        fix = "Set MIXER_CACHE to another folder"
        raise UserError(what, where=path.parent, fix=fix) from error
    _check_file(published, path)
    return path


def _download(published: Published, path: Path, report: Reporter) -> None:
    partial = path.with_name(f"{path.name}.partial")
    size = f"{published.mebibytes} MiB, " if published.mebibytes else ""
    report.say(f"fetching {published.name} ({size}{published.url})")
    report.say(f"      to {path}")
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
            kept = _size_of(partial) / _MEBIBYTE
            report.say(f"again    {reason}; {kept:,.1f} MiB are there")
        try:
            _receive(published, partial, report)
            break
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server says {error.code} {error.reason}"
            if error.code < 500:
                raise _by_hand(published, path, reason) from error
        except urllib.error.URLError as error:  # nobody there: trying again would only wait
            if not isinstance(error.reason, TimeoutError):
                raise _by_hand(published, path, f"no connection ({error.reason})") from error
            reason = "the server does not answer"
        except UserError:
            raise
        except ValueError as error:  # an address that the server sent us to
            raise _by_hand(published, path, f"not an address: {error}") from error
        except _BROKEN as error:
            reason = f"the connection broke ({str(error) or type(error).__name__})"
    else:
        kept = f"; {_size_of(partial):,} bytes are kept and continued next time"
        raise _by_hand(published, path, reason + kept * partial.is_file())
    try:
        digest = _check_new(published, partial, _record(path))
    except UserError:
        _forget(partial)
        raise
    _record(path).write_text(f"{digest}  {path.name}\n")
    os.replace(partial, path)
    _forget(partial)


class _Interrupted(Exception):
    """The connection ended before the file did."""


_BROKEN = (_Interrupted, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)


def _receive(published: Published, partial: Path, report: Reporter) -> None:
    """Brings the rest of the file into `partial`, from its beginning where it has changed."""
    start, validator = _size_of(partial), _validator(partial)
    request = urllib.request.Request(published.url, headers={"User-Agent": "allmlp"})
    if start and validator:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", validator)
    with _open(request, partial) as response:
        if response is None:  # all of it is there already
            return
        length = response.headers.get("Content-Length", "")
        if response.status != 206:
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            _forget(partial)
            raise _Interrupted("the server gave another part of the file than asked for")
        total = start + int(length) if length.isdecimal() else None
        _check_announced(published, total)
        free = shutil.disk_usage(partial.parent).free
        if total is not None and total - start > free:
            what = f"{published.name} needs {total - start:,} bytes, {free:,} are free"
            fix = "Make room, or set MIXER_CACHE to another folder"
            raise UserError(what, where=partial.parent, fix=fix)
        found = response.headers.get("ETag") or response.headers.get("Last-Modified")
        weak = found is None or found.startswith("W/")  # does not promise the same bytes
        _note(partial).write_text(json.dumps({"validator": None if weak else found}))
        _copy(response, partial, start, total, report)


@contextlib.contextmanager
def _open(
    request: urllib.request.Request, partial: Path
) -> Iterator[http.client.HTTPResponse | None]:
    """Gives the response, or None where the server says that the partial file is the whole."""
    try:
        response = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        total = error.headers.get("Content-Range", "").removeprefix("bytes */")
        error.close()
        if total != str(_size_of(partial)):
            _forget(partial)  # it is longer than the file: begin again
            raise _Interrupted("the file on the server has changed") from error
        yield None
        return
    with response:
        yield response


def _next_block(response: http.client.HTTPResponse) -> bytes:
    """Returns what has come, at most a block; b"" at the end."""
    try:
        return response.read1(_BLOCK)
    except OSError as error:  # no route any more, reset, timed out: not the disk's fault
        raise _Interrupted(error.strerror or str(error) or type(error).__name__) from error


def _copy(
    response: http.client.HTTPResponse,
    partial: Path,
    start: int,
    total: int | None,
    report: Reporter,
) -> None:
    done, shown, said = start, start // _MEBIBYTE, time.monotonic()
    mebibytes = (total or 0) // _MEBIBYTE
    with partial.open("ab" if start else "wb") as file, report.progress(mebibytes, "MiB") as bar:
        bar.advance(shown, description=partial.name.removesuffix(".partial"))
        while block := _next_block(response):
            file.write(block)
            done += len(block)
            bar.advance(done // _MEBIBYTE - shown)
            shown = done // _MEBIBYTE
            if not report.console.is_terminal and time.monotonic() - said > 30:
                report.say(f"         {shown:,} of {mebibytes:,} MiB")
                said = time.monotonic()
        file.flush()
        os.fsync(file.fileno())
    if total is not None and done < total:
        raise _Interrupted(f"the connection ended after {done:,} of {total:,} bytes")


def _check_announced(published: Published, total: int | None) -> None:
    """Refuses, before anything is written, a file whose size is not the published one."""
    if total is not None and not _fits(published, total):
        raise _changed(published, f"{total:,} bytes", f"{published.mebibytes} MiB")


def _fits(published: Published, size: int) -> bool:
    return published.mebibytes is None or abs(size / _MEBIBYTE - published.mebibytes) < 0.006


def _changed(published: Published, found: str, expected: str, where: object = None) -> UserError:
    return UserError(
        f"{published.name} is not the published file: {found} where {expected} is expected",
        where=where or published.url,
        fix="It was changed or something between has answered in its place: do not use it",
    )


def _check_new(published: Published, partial: Path, record: Path) -> str:
    """Returns the sha256 of a downloaded file that is the published one, or the one of before."""
    size, digest = _size_of(partial), sha256_of(partial)
    if not _fits(published, size):
        raise _changed(published, f"{size:,} bytes", f"{published.mebibytes} MiB")
    if published.sha256 and not digest.startswith(published.sha256):
        raise _changed(published, f"sha256 {digest}", f"{published.sha256}...")
    if digest != (before := _recorded(record) or digest):
        what = f"{published.name} has changed since it was fetched first: sha256 {digest}, then "
        fix = f"If that is right, delete {record} and load it again"
        raise UserError(f"{what}{before}", where=published.url, fix=fix)
    return digest


def _check_file(published: Published, path: Path) -> None:
    """Checks a file of the cache by size and sha256, published or recorded; records a first one."""
    size, digest, record = _size_of(path), sha256_of(path), _record(path)
    recorded = _recorded(record)
    expected = recorded or published.sha256 or ""
    if not _fits(published, size) or not digest.startswith(expected):
        found, wanted = f"sha256 {digest}", f"sha256 {expected}..."
        if not _fits(published, size):
            found, wanted = f"{size:,} bytes", f"{published.mebibytes} MiB"
        raise UserError(
            f"the cached file of {published.name} is damaged: {found} where {wanted} is expected",
            where=path,
            fix=f"Delete it (and {record.name}); it is fetched again",
        )
    if not recorded:
        with contextlib.suppress(OSError):  # a cache that one may only read
            record.write_text(f"{digest}  {path.name}\n")


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_hand(published: Published, path: Path, reason: str) -> UserError:
    return UserError(
        f"cannot download {published.name}: {reason}",
        where=published.url,
        fix=f"Fetch that file by other means and put it at {path}",
    )


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _recorded(record: Path) -> str | None:
    """Returns the sha256 that was written down at the first download."""
    words = record.read_text(errors="replace").split() if record.is_file() else []
    return words[0] if words else None


def _note(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _validator(partial: Path) -> str | None:
    try:
        return parse_json(_note(partial).read_text())["validator"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _note(partial).unlink(missing_ok=True)
