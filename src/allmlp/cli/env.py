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
    from importlib.metadata import requires

    import torch

    from allmlp.environment import environment_info, packages
    from allmlp.names import NAME
    from allmlp.runtime.device import choose_device, has_fast_bfloat16

    features = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    values = environment_info(choose_device("auto"))
    values |= {"cpu_features": features, "fast_bfloat16": has_fast_bfloat16()}
    needed = {re.split("[^\\w.-]", need)[0] for need in requires(NAME) or ()} - {NAME}
    installed = packages(needed)
    values["packages"] = {name: installed.get(name) for name in sorted(needed)}
    del values["date"], values["command"]
    for name, value in values.items():
        if isinstance(value, list):
            value = " ".join(value)
        if name != "packages":
            print(f"{name:13} {value}")
    print("packages")
    for name, found in values["packages"].items():
        print(f"  {name:24} {found or 'not installed'}")
    return Done(values)
