"""UserError: an error caused by user input rather than a bug; on the command line, exit code 2."""

from __future__ import annotations

import contextlib
import difflib
import errno
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


class UserError(ValueError):
    """An error that the user can fix.

    Args:
        what: what is wrong, with the offending value.
        where: the file, flag or class concerned; None if `what` names it.
        fix: what to do or type; None only if nothing can be done.
        code: stable identifier of the kind of error, independent of the wording.
    """

    is_printed = False  # by another of several processes

    def __init__(
        self, what: str, *, where: object = None, fix: str | None = None, code: str = "invalid"
    ) -> None:
        self.what, self.where, self.fix = what, None if where is None else str(where), fix
        self.code = code
        super().__init__(self.text())

    def text(self) -> str:
        """The full message, one part per line."""
        lines = [self.what]
        if self.where is not None:
            lines.append(f"where: {self.where}")
        if self.fix is not None:
            lines.append(f"to fix: {self.fix}")
        return "\n".join(lines)


def near_names(name: str, known: Iterable[str]) -> str:
    """Returns 'Did you mean X or Y? ' for known names similar to `name`, or ''."""
    whole = {candidate.lower(): candidate for candidate in known}
    names = {key.rpartition(".")[2]: candidate for key, candidate in whole.items()} | whole
    near = difflib.get_close_matches(name.lower(), names, cutoff=0.65)
    near = near or [key for key in names if len(name) > 2 and name.lower() in key][:3]  # a part
    return f"Did you mean {' or '.join(dict.fromkeys(names[key] for key in near))}? " * bool(near)


def one_of(name: str, value: Any, choices: Iterable[Any], where: object = None) -> Any:
    """Returns the value if it is one of the choices."""
    known = list(choices)
    if value not in known:
        texts = [str(choice) for choice in known]
        fix = f"{near_names(str(value), texts)}Known: {', '.join(texts)}"
        raise UserError(f"unknown {name} {value!r}", where=where, fix=fix, code="unknown-name")
    return value


def between(name: str, value: Any, low: float, high: float) -> Any:
    """Returns the value if None or in [low, high], which NaN is not."""
    if value is not None and not low <= value <= high:
        most = "" if high == math.inf else f" and at most {high}"
        what = f"{name} must be at least {low}{most}, got {value!r}"
        raise UserError(what, code="out-of-range")
    return value


def needs(given: Mapping[str, Any], name: str, value: Any) -> None:
    """Checks that the options in `given` are unset (None or False) unless option `name` is set."""
    for option, its_value in given.items():
        if its_value not in (None, False) and value in (None, False):
            what = f"{option} needs {name}, and that is not given"
            raise UserError(what, fix=f"Add {name}, or leave {option} out", code="needs")


def exclusive(**given: Any) -> None:
    """Checks that at most one of these options is set (not None, False or empty)."""
    unset = (None, False, ())
    names = [name for name, value in given.items() if not any(value is one for one in unset)]
    if len(names) > 1:
        what = f"{' and '.join(names)} exclude each other"
        raise UserError(what, fix="Give one of them", code="conflict")


def plural(number: int, noun: str) -> str:
    """Returns "1 image" or "1,234 images"; nouns ending in s take es."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def some_of(names: Sequence[str], most: int = 8) -> str:
    """Returns "a, b and 3 more"."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_NO_SPACE = "Free some space there, or give a place on another disk"
_NO_ACCESS = "Give a place that you may use, or change its mode"
# Fixes for system errors, by errno.
_FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _NO_SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_ACCESS),
    errno.EMFILE: "Raise the limit of open files (ulimit -n), or set num_workers to 1",
    errno.ENAMETOOLONG: "Give a shorter name",
}


def fix_of(error: OSError) -> str | None:
    """Returns how to fix a system error such as a full disk."""
    return None if error.errno is None else _FIXES.get(error.errno)


@contextlib.contextmanager
def disk_errors(what: str, where: object) -> Iterator[None]:
    """Turns system errors, such as a full disk, into a UserError that begins with `what`."""
    try:
        yield
    except OSError as error:
        what = f"{what}: {error.strerror or error}"
        fix = fix_of(error) or "Give another output"
        raise UserError(what, where=where, fix=fix, code="disk") from error


# Out-of-memory messages of numpy, torch, CUDA, ONNX Runtime and C++.
_NO_MEMORY = (
    r"can't allocate memory|Cannot allocate memory|Unable to allocate|[Oo]ut of memory|bad_alloc"
    r"|[Ff]ailed to allocate memory|MemoryError"
)


@contextlib.contextmanager
def named_memory_errors() -> Iterator[None]:
    """Turns any library's out-of-memory error into a `UserError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not re.search(_NO_MEMORY, text):
            raise
        what = f"there is not enough memory: {text[:200]}".removesuffix(": ")
        fix = "Reduce batch_size, image_size or num_workers, or use a smaller model"
        raise UserError(what, fix=fix) from error
