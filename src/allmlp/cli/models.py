"""`mixer models`."""

from __future__ import annotations

from typing import Any

from allmlp.cli.arguments import Assignments, Number, Size, Source, overrides_of, parse_size
from allmlp.errors import UserError


def models(
    *,
    image_size: Size = None,
    num_classes: Number = None,
    weights: bool = False,
    comparison: bool = False,
    inspect: Source = None,
    settings: Assignments = (),
) -> None:
    """List the architectures, the published weights, or what a weights file holds.

    Examples of use:
        mixer models
        mixer models --image-size 448
        mixer models --set token_mixing=grouped --set token_groups=4
        mixer models --weights
        mixer models --comparison
        mixer models --inspect Mixer-B_16.npz

    Args:
        image_size: at this size; the default is the paper's 224.
        num_classes: outputs of the head, for the column "with head" (1000).
        weights: list every published checkpoint: origin, size, preprocessing, accuracy, licence.
        comparison: list the systems that the paper compares with, which timm builds.
        inspect: say what a file (or anything else that names a model) is, and list its tensors.
        settings: a field of the configuration, such as token_mixing=untied, for all models that
            have it; may be given many times.
    """
    size = parse_size(image_size)
    flags = {"--weights": weights, "--comparison": comparison, "--inspect": inspect}
    flags |= {"--num-classes": num_classes}
    given = [name for name, value in flags.items() if value]
    if (weights or comparison) and image_size is not None:
        given.append("--image-size")
    if (weights or comparison or inspect) and settings:
        given.append("--set")
    if len(given) > 1:
        what = f"{' and '.join(given)} do not go together"
        raise UserError(what, where="mixer models", fix="Give one of them")
    if inspect is not None:
        from allmlp.weights.report import inspect_file

        pair = (size, size) if isinstance(size, int) else size
        print("\n".join(inspect_file(inspect, pair)))
    elif weights:
        from allmlp.weights.report import list_checkpoints

        print("\n".join(list_checkpoints()))
    elif comparison:
        from allmlp.models.comparison_systems import list_comparison

        print("\n".join(list_comparison()))
    else:
        classes = 1000 if num_classes is None else num_classes
        print("\n".join(_architectures(size, classes, overrides_of(settings, "--set"))))


def _architectures(
    size: int | tuple[int, int] | None, num_classes: int, overrides: dict[str, Any]
) -> list[str]:
    import torch

    from allmlp.console import table
    from allmlp.evaluation.throughput import count_parameters
    from allmlp.models.catalog import create_model, list_models

    rows, skipped, without = [], [], []
    for name in list_models():
        try:
            with torch.device("meta"):
                model = create_model(name, size, num_classes, **overrides)
        except UserError as error:
            if "has no setting" in error.what:
                without.append((name, error))
            else:
                skipped.append(error.text())
            continue
        head = sum(p.numel() for key, p in model.named_parameters() if key.startswith("head."))
        parameters = count_parameters(model)
        height, width = model.config.image_size
        cells = [name, f"{height}x{width}", f"{parameters - head:,}", f"{parameters:,}"]
        grids = getattr(model.config, "grids", ())  # of a model in stages; their first and last
        counts = [h * w for h, w in (grids[0], grids[-1])] if grids else model.config.tokens
        tokens = " to ".join(f"{each:,}" for each in dict.fromkeys(counts))
        rows.append([*cells, f"{model.config.flops / 1e9:.2f}", tokens])
    if not rows and without and not skipped:
        raise without[0][1]
    if not rows:
        raise UserError(skipped[0])
    header = ["name", "pixels", "parameters", "with head", "GFLOPs", "tokens"]
    lines = table(header, rows)
    lines.append("GFLOPs of one image with the head; a multiply-add counts as two.")
    lines.append("Where two numbers of tokens stand: of the first stage and of the last.")
    lines += [f"left out: {line}" for line in skipped]
    if without:
        lines.append(f"left out, for want of such a setting: {', '.join(n for n, _ in without)}")
    return lines
