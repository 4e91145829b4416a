"""Packages that only some verbs need: imported when used, and one line where they are absent."""

from __future__ import annotations

import importlib
from typing import Any

from allmlp.errors import UserError
from allmlp.names import extra

EXTRAS = {
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "openvino": "openvino",
    "starlette": "serve",
    "uvicorn": "serve",
    "python_multipart": "serve",
}


def needed(name: str) -> Any:
    """Returns a module of an extra.

    Args:
        name: of the module: "onnx", "onnxscript.optimizer", ...

    Raises:
        UserError: it is not installed; says what to type.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        fix = extra(EXTRAS[package])
        raise UserError(f"this needs {package}, which is not installed", fix=fix) from error
