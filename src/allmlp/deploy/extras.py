"""Optional dependencies: imported when used, with a UserError that says what to install."""

from __future__ import annotations

import importlib
from typing import Any

from allmlp.errors import UserError
from allmlp.names import extra


def import_extra(name: str, group: str) -> Any:
    """Returns a module of an optional group of dependencies."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        what = f"this needs {package}, which is not installed"
        raise UserError(what, fix=extra(group), code="missing-package") from error
