"""`mixer models`: architectures, published weights, or the contents of a weights file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from allmlp.console import table
from allmlp.errors import UserError
from allmlp.options import Done, ImageSize, Options, Repeated, assignments


@dataclass(frozen=True, kw_only=True)
class ModelsOptions(Options):
    """List architectures, published weights, or the contents of a weights file.

    Examples:
        mixer models
        mixer models --image-size 448
        mixer models --set token_mixing=grouped --set token_groups=4
        mixer models --weights
        mixer models --comparison
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
    comparison: bool = False
    """List the systems the paper compares with, which timm builds."""
    inspect: str | None = field(default=None, metadata={"metavar": "MODEL"})
    """Describe a file (or anything else that names a model) and list its tensors."""

    def __post_init__(self) -> None:
        kinds = [name for name in ("weights", "comparison", "inspect") if getattr(self, name)]
        of_architectures = ["num_classes", "settings", "image_size"]
        if kinds == ["inspect"]:
            of_architectures.remove("image_size")  # for files that do not store it
        given = kinds + [name for name in of_architectures if kinds and getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} do not go together", fix="Give one of them")


def models(options: ModelsOptions) -> Done:
    """Prints the requested list."""
    from allmlp.paper.comparison_systems import list_comparison  # not needed by --help
    from allmlp.weights.checkpoints import CHECKPOINTS
    from allmlp.weights.report import checkpoint_table, inspect_file

    rows: list[dict[str, Any]] = []
    if options.inspect is not None:
        size = options.image_size
        lines = inspect_file(options.inspect, (size, size) if isinstance(size, int) else size)
    elif options.weights:
        lines = checkpoint_table()
        rows = [{"name": name, **asdict(known)} for name, known in CHECKPOINTS.items()]
    else:
        lines = list_comparison() if options.comparison else _architectures(options, rows)
    print("\n".join(lines))
    return Done({"models": rows} if rows else {"lines": lines})


def _architectures(options: ModelsOptions, found: list[dict[str, Any]]) -> list[str]:
    """Returns the table; adds its rows to `found`."""
    import torch

    from allmlp.models.catalog import create_model, list_models

    classes = 1000 if options.num_classes is None else options.num_classes
    overrides = assignments(options.settings)
    rows, skipped, without = [], [], []
    for name in list_models():
        try:
            with torch.device("meta"):
                model = create_model(name, options.image_size, classes, **overrides)
        except UserError as error:
            if "has no setting" in error.what:
                without.append((name, error))
            else:
                skipped.append(error.text())
            continue
        config = model.config
        head = sum(p.numel() for key, p in model.named_parameters() if key.startswith("head."))
        parameters = model.num_parameters
        tokens = " to ".join(f"{n:,}" for n in dict.fromkeys((config.tokens[0], config.tokens[-1])))
        pixels = f"{config.image_size[0]}x{config.image_size[1]}"
        cells = [name, pixels, f"{parameters - head:,}", f"{parameters:,}"]
        found.append(
            {
                "name": name,
                "image_size": config.image_size,
                "parameters": parameters,
                "parameters_without_head": parameters - head,
                "flops": config.flops,
                "tokens": (config.tokens[0], config.tokens[-1]),
            }
        )
        rows.append([*cells, f"{config.flops / 1e9:.2f}", tokens])
    if not rows and without and not skipped:
        raise without[0][1]
    if not rows:
        raise UserError(skipped[0])
    lines = table(["name", "pixels", "parameters", "with head", "GFLOPs", "tokens"], rows)
    lines.append("GFLOPs per image with the head; a multiply-add counts as two.")
    lines.append("Two numbers of tokens: of the first stage or layer, and of the last.")
    lines += [f"left out: {line}" for line in skipped]
    if without:
        lines.append(f"left out, without such a setting: {', '.join(n for n, _ in without)}")
    return lines
