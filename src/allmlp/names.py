"""The package's name, and the one used in files before version 0.2."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from allmlp.errors import UserError

NAME, OLD_NAME = "allmlp", "mlp_mixer"
HUB_NAME = r"[\w.-]+/[\w.-]+"  # owner/name on the Hugging Face hub


def is_format(found: object, expected: str) -> bool:
    """Returns whether a file's format is the expected one, under the current or the old name."""
    return found in (expected, expected.replace(NAME, OLD_NAME))


def own_entry(entries: Mapping[str, Any]) -> Any:
    """Returns the header entry under our current or old name."""
    return entries.get(NAME, entries.get(OLD_NAME))


def extra(name: str) -> str:
    return f"pip install '{NAME}[{name}]'"


def import_extra(name: str, group: str, what: str | None = None, where: object = None) -> Any:
    """Imports a module from an optional dependency group; raises `what` if it is missing."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if what is None and error.name not in (package, name):
            raise  # it is there, and lacks something itself
        what = what or f"this needs {package}, which is not installed"
        raise UserError(what, where=where, fix=extra(group), code="missing-package") from error
