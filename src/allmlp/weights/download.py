"""Downloads: from the web into our cache, and "hf:owner/name[@revision]" into that of the hub.

Ours go to NAME.TAG.partial and are renamed once size and checksum match. TAG is the server's
version of the file: an interrupted download is resumed only if it is unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import tempfile
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

from allmlp.console import Reporter
from allmlp.errors import UserError
from allmlp.io import expand, is_reachable, locked, sha256_of
from allmlp.names import HUB_NAME

PATIENCE = 30.0  # seconds without a response
HUB_PREFIX = "hf:"
# In order of preference; a pickle is the last resort, and read as plain tensors only.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class Published:
    name: str  # of the checkpoint, for messages
    url: str
    mebibytes: float | None = None  # published size, to two decimals
    sha256: str | None = None  # published digits, the first eight or all

    def check_size(self, size: int) -> str | None:
        """Returns what is wrong with a size in bytes, or None."""
        if self.mebibytes is None or abs(size / 2**20 - self.mebibytes) < 0.006:
            return None
        return f"{size:,} bytes where {self.mebibytes} MiB are expected"


def cache_folder() -> Path:
    """Returns the cache folder: MIXER_CACHE, or else allmlp in the user's cache folder."""
    if chosen := os.environ.get("MIXER_CACHE"):
        return expand(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "allmlp"
    except RuntimeError:  # a user without a home directory, as in containers
        return Path(tempfile.gettempdir()) / "allmlp"


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def cached(published: Published, path: Path, report: Reporter) -> Path:
    """Returns `path` once it holds the complete, verified file, downloading it if necessary."""
    if path.is_file():
        if problem := _verify(published, path, path):
            what = f"the cached file of {published.name} is damaged: {problem}"
            fix = f"Delete it (and {path.name}.sha256); it is downloaded again"
            raise UserError(what, where=path, fix=fix, code="damaged")
        return path
    if is_offline():
        raise _by_hand(published, path, "HF_HUB_OFFLINE forbids downloads")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(Path(f"{path}.lock"), timeout=-1)  # another process may be downloading it
        try:
            if not path.is_file():
                _download(published, path, report)
        finally:
            if lock is not None:
                lock.release()
    except OSError as error:
        what = f"cannot write to the cache: {error.strerror or error}"
        fix = "Set MIXER_CACHE to another folder"
        raise UserError(what, where=path.parent, fix=fix) from error
    return path


def _download(published: Published, path: Path, report: Reporter) -> None:
    size = f"{published.mebibytes} MiB, " if published.mebibytes else ""
    report.say(f"fetching {published.name} ({size}{published.url})\n      to {path}")
    try:
        partial, reason = _receive(published, path, quiet=report.console.quiet), ""
    except (UserError, PermissionError):
        raise
    except Exception as error:  # http_get and the layers below can raise anything
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the answer
        partial, reason = path, (str(error) or type(error).__name__).splitlines()[0]
    if reason:  # outside the except block: the error holds a connection
        raise _by_hand(published, path, reason)
    if problem := _verify(published, partial, path):
        partial.unlink()
        raise _changed(published, problem)
    os.replace(partial, path)


def _receive(published: Published, path: Path, *, quiet: bool) -> Path:
    from huggingface_hub.file_download import http_get  # takes a third of a second
    from huggingface_hub.utils import tqdm

    headers = {"User-Agent": "allmlp", "Accept-Encoding": "identity"}
    head = urllib.request.Request(published.url, headers=headers, method="HEAD")
    with urllib.request.urlopen(head, timeout=PATIENCE) as response:
        length = response.headers.get("Content-Length", "")
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
    total = int(length) if length.isdecimal() else None
    if total is not None and (problem := published.check_size(total)):
        raise _changed(published, problem)
    version = zlib.crc32(f"{tag} {total}".encode())
    partial = path.with_name(f"{path.name}.{version:08x}.partial")
    is_weak = tag is None or tag.startswith("W/")  # the same bytes are not guaranteed
    for other in path.parent.glob("*.partial"):
        if other.name.startswith(path.name) and (is_weak or other != partial):
            other.unlink()
    with partial.open("ab") as file:
        http_get(  # resumes up to five times
            published.url,
            file,
            resume_size=file.tell(),
            headers=headers,
            expected_size=total,
            displayed_filename=path.name,
            _tqdm_bar=tqdm(disable=True) if quiet else None,
        )
        file.flush()
        os.fsync(file.fileno())
    return partial


def _verify(published: Published, file: Path, path: Path) -> str | None:
    """Returns what is wrong with a file, or None; records the sha256 of the first download."""
    if problem := published.check_size(file.stat().st_size):
        return problem
    record = path.with_name(f"{path.name}.sha256")
    words = record.read_text(errors="replace").split() if record.is_file() else []
    digest = sha256_of(file)
    for expected in (published.sha256 or "", *words[:1]):
        if not digest.startswith(expected):
            since = f" (recorded at the first download in {record})" if expected in words else ""
            return f"sha256 {digest} where {expected} is expected{since}"
    if not words:
        with contextlib.suppress(OSError):  # the cache may be read-only
            record.write_text(f"{digest}  {path.name}\n")
    return None


def _changed(published: Published, problem: str) -> UserError:
    what = f"{published.name} is not the published file: {problem}"
    fix = "It was changed, or something in between answered in its place: do not use it"
    return UserError(what, where=published.url, fix=fix, code="changed")


def _by_hand(published: Published, path: Path, reason: str) -> UserError:
    what = f"cannot download {published.name}: {reason}"
    fix = f"Try again, or get that file another way and put it at {path}"
    return UserError(what, where=published.url, fix=fix, code="no-download")


# The Hugging Face hub


def parse_hub_name(source: str) -> tuple[str, str | None]:
    """Splits "hf:owner/name[@revision]" into owner/name and the revision, or None."""
    found = re.fullmatch(rf"hf:({HUB_NAME})(?:@([\w./-]+))?", source)
    if not found:
        fix = "hf:owner/name or hf:owner/name@revision"
        raise UserError(f"not a model on the hub: {source!r}", fix=fix)
    return found[1], found[2]


def fetch_from_hub(name: str, revision: str | None) -> Path:
    """Returns the path of a hub model's weights, with its config.json in the same folder."""
    is_unreachable = not can_reach_hub()
    _get(name, "config.json", revision, is_unreachable)  # optional: tensors describe themselves
    for file in _HUB_FILES:
        path = _get(name, file, revision, is_unreachable)
        if path is not None:
            blob = path.resolve()  # the hub's cache names large files by their sha256
            if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256_of(blob) != blob.name:
                fix = f"Delete {blob} and load the model again"
                what = "the cached file is damaged: its sha256 does not match"
                raise UserError(what, where=path, fix=fix, code="damaged")
            return path
    raise UserError(f"{name} has none of {', '.join(_HUB_FILES)}", where="the hub")


def can_reach_hub() -> bool:
    """Whether the hub answers; without a network its library retries for half a minute."""
    from huggingface_hub import constants

    return not is_offline() and is_reachable(constants.ENDPOINT)


def _get(name: str, file: str, revision: str | None, is_unreachable: bool) -> Path | None:
    import huggingface_hub
    from huggingface_hub import constants, errors

    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    try:
        found = huggingface_hub.hf_hub_download(
            name, file, revision=revision, local_files_only=is_unreachable
        )
        return Path(found)
    except errors.LocalEntryNotFoundError as error:
        known = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if known is huggingface_hub._CACHED_NO_EXIST:  # cached as missing on the hub
            return None
        reason = "the hub cannot be reached" if is_unreachable else _cause(error)
        what, where = f"{name} is not in the cache and {reason}", f"{constants.HF_HUB_CACHE}"
        raise UserError(what, where=where, fix=f"With a network: {command}") from error
    except errors.EntryNotFoundError:
        return None
    except Exception as error:  # the hub library can raise anything
        what, fix = f"cannot download {name}: {_cause(error)}", f"By hand: {command}"
        if isinstance(error, errors.RevisionNotFoundError):
            what, fix = f"{name} has no revision {revision!r}", "Leave @revision out for main"
        elif isinstance(error, errors.RepositoryNotFoundError):  # includes gated repositories
            what = f"no model {name!r}, or it is private"
            fix = "If you have access: hf auth login"
        raise UserError(what, where="the hub", fix=fix) from error


def _cause(error: BaseException) -> str:
    first = error.__cause__ or error
    return (str(first) or type(first).__name__).splitlines()[0]
