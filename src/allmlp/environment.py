"""The environment of a measurement: versions, hardware, command, date."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from allmlp.names import NAME

_PACKAGES = (
    *("torch", "numpy", "pillow", "simplejpeg", "opencv-python-headless", "safetensors"),
    *("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("pyarrow", "datasets", "timm"),
)


def environment_info(device: torch.device) -> dict[str, Any]:
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command(),
        NAME: version(NAME),
        "python": platform.python_version(),
        "packages": packages(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": _device_name(device),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "mps":
        return torch.backends.mps.get_name()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@functools.cache
def packages(names: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Returns the versions of installed packages, by default of those that may affect results."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def command() -> str | None:
    """Returns the command line, or None outside of a `mixer` command."""
    is_command = Path(sys.argv[0]).name in ("mixer", "__main__.py")
    return shlex.join(["mixer", *sys.argv[1:]]) if is_command else None


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
