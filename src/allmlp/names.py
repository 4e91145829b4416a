"""The name of this package, and the one that its files carried before version 0.2."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from allmlp.errors import UserError

NAME, OLD_NAME = "allmlp", "mlp_mixer"

Value = TypeVar("Value")


def is_format(found: object, expected: str) -> bool:
    """Returns whether a file's format is the expected one, under the present name or the old."""
    return found in (expected, expected.replace(NAME, OLD_NAME))


def own_entry(entries: Mapping[str, Value]) -> Value | None:
    """Returns the entry of a file's header that carries our name, the present one or the old."""
    return entries.get(NAME, entries.get(OLD_NAME))


def optional(module: str, group: str, what: str, where: object = None) -> Any:
    """Returns a module of an optional group of dependencies; without it, `what` is the error."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(what, where=where, fix=extra(group)) from error


def extra(name: str) -> str:
    """Returns the command that installs an optional group of dependencies."""
    return f"pip install '{NAME}[{name}]'"


def import_extra(name: str, group: str) -> Any:
    """Returns a module of an optional group of dependencies, or raises how to install it."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (package, name):
            raise
        what = f"this needs {package}, which is not installed"
        raise UserError(what, fix=extra(group), code="missing-package") from error
