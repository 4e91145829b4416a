"""`mixer env`: versions, hardware and installed extras."""

from __future__ import annotations

from dataclasses import dataclass

from allmlp.options import Done, Options


@dataclass(frozen=True, kw_only=True)
class EnvOptions(Options):
    """Report versions, hardware and installed extras, for example for a bug report.

    Examples:
        mixer env
        mixer env --json
    """


def env(_: EnvOptions) -> Done:
    """Prints the environment."""
    import re
    from importlib.metadata import PackageNotFoundError, requires, version

    import torch

    from allmlp.environment import environment_info
    from allmlp.names import NAME
    from allmlp.runtime.device import choose_device, has_fast_bfloat16

    features = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    values = environment_info(choose_device("auto"))
    values |= {"cpu_features": features, "fast_bfloat16": has_fast_bfloat16()}
    packages: dict[str, str | None] = {}
    for name in sorted({re.split("[^\\w.-]", need)[0] for need in requires(NAME) or ()} - {NAME}):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    values["packages"] = packages
    del values["date"], values["command"]
    for name, value in values.items():
        if isinstance(value, list):
            value = " ".join(value)
        if name != "packages":
            print(f"{name:13} {value}")
    print("packages")
    for name, found in packages.items():
        print(f"  {name:24} {found or 'not installed'}")
    return Done(values)
