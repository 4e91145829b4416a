"""`mixer models` and `mixer env`: what there is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from allmlp.console import table_of
from allmlp.errors import UserError, exclusive
from allmlp.options import Done, ImageSize, Options, Repeated, assignments


@dataclass(frozen=True, kw_only=True)
class ModelsOptions(Options):
    """List architectures, published weights, or the contents of a weights file.

    Examples:
        mixer models
        mixer models --image-size 448
        mixer models --set token_mixing=grouped --set token_groups=4
        mixer models --weights
        mixer models --inspect Mixer-B_16.npz
    """

    image_size: ImageSize | None = None
    """Image size for the parameter and operation counts; defaults to the paper's 224."""
    num_classes: int | None = None
    """Number of classes for the column "with head" (default 1000)."""
    settings: Repeated = field(default=(), metadata={"flag": "set", "metavar": "KEY=VALUE"})
    """Override a field of the configuration, e.g. token_mixing=untied, in all models that have
    it."""
    weights: bool = False
    """List the published checkpoints: origin, size, preprocessing, accuracy, licence."""
    inspect: str | None = field(default=None, metadata={"metavar": "MODEL"})
    """Describe a file (or anything else that names a model) and list its tensors."""

    def __post_init__(self) -> None:
        exclusive(weights=self.weights, inspect=self.inspect, num_classes=self.num_classes)
        exclusive(weights=self.weights, inspect=self.inspect, settings=self.settings)
        exclusive(weights=self.weights, image_size=self.image_size)


def models(options: ModelsOptions) -> Done:
    from allmlp.weights.checkpoints import CHECKPOINTS  # not needed by --help
    from allmlp.weights.report import checkpoint_table, inspect_file

    rows: list[dict[str, Any]] = []
    if options.inspect is not None:
        size = options.image_size
        lines = inspect_file(options.inspect, (size, size) if isinstance(size, int) else size)
    elif options.weights:
        lines = checkpoint_table()
        rows = [{"name": name, **asdict(known)} for name, known in CHECKPOINTS.items()]
    else:
        rows, errors = _architectures(options)
        lines = [*_table(rows), *(f"left out: {error.what}" for error in errors)]
    print("\n".join(lines))
    return Done({"models": rows} if rows else {"lines": lines})


def _architectures(options: ModelsOptions) -> tuple[list[dict[str, Any]], list[UserError]]:
    """Returns the models that these options can build, and why the others cannot be."""
    import torch

    from allmlp.models.catalog import create_model, list_models

    classes = 1000 if options.num_classes is None else options.num_classes
    overrides = assignments(options.settings)
    found, errors = [], []
    for name in list_models():
        try:
            with torch.device("meta"):
                model = create_model(name, options.image_size, classes, **overrides)
        except UserError as error:
            errors.append(error)
            continue
        config, parameters = model.config, model.named_parameters()
        head = sum(value.numel() for key, value in parameters if key.startswith("head."))
        found.append(
            {
                "name": name,
                "image_size": config.image_size,
                "parameters": model.num_parameters,
                "parameters_without_head": model.num_parameters - head,
                "flops": config.flops,
                "tokens": (config.tokens[0], config.tokens[-1]),
            }
        )
    if not found:
        raise errors[0]
    return found, errors


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = table_of(
        {
            "name": row["name"],
            "pixels": "x".join(map(str, row["image_size"])),
            "parameters": f"{row['parameters_without_head']:,}",
            "with head": f"{row['parameters']:,}",
            "GFLOPs": f"{row['flops'] / 1e9:.2f}",
            "tokens": " to ".join(f"{number:,}" for number in dict.fromkeys(row["tokens"])),
        }
        for row in rows
    )
    lines.append("GFLOPs per image with the head; a multiply-add counts as two.")
    return [*lines, "Two numbers of tokens: of the first stage or layer, and of the last."]


@dataclass(frozen=True, kw_only=True)
class EnvOptions(Options):
    """Report versions, hardware and installed extras, for example for a bug report.

    Examples:
        mixer env
        mixer env --json
    """


def env(_: EnvOptions) -> Done:
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
    installed = packages(tuple(sorted(needed)))
    values["packages"] = {name: installed.get(name) for name in sorted(needed)}
    del values["date"], values["command"]
    for name, value in values.items():
        if name != "packages":
            print(f"{name:13} {' '.join(value) if isinstance(value, list) else value}")
    print("packages")
    for name, found in values["packages"].items():
        print(f"  {name:24} {found or 'not installed'}")
    return Done(values)
