"""`mixer models`."""

from __future__ import annotations

from mlp_mixer.cli.arguments import Size, parse_size
from mlp_mixer.errors import UserError


def models(*, image_size: Size = None, num_classes: int = 1000) -> None:
    """List the architectures with their parameters, GFLOPs and tokens.

    Examples of use:
        mixer models
        mixer models --image-size 448

    Args:
        image_size: at this size; the default is the paper's 224.
        num_classes: outputs of the head, for the column "with head".
    """
    import torch

    from mlp_mixer.console import table
    from mlp_mixer.evaluation.throughput import count_parameters
    from mlp_mixer.models.catalog import create_model, list_models

    size, rows, skipped = parse_size(image_size), [], []
    for name in list_models():
        try:
            with torch.device("meta"):
                model = create_model(name, size, num_classes)
        except UserError as error:
            skipped.append(error.text())
            continue
        head = sum(p.numel() for key, p in model.named_parameters() if key.startswith("head."))
        parameters = count_parameters(model)
        height, width = model.config.image_size
        cells = [name, f"{height}x{width}", f"{parameters - head:,}", f"{parameters:,}"]
        rows.append([*cells, f"{model.config.flops / 1e9:.2f}", f"{model.config.num_tokens:,}"])
    if not rows:
        raise UserError(skipped[0])
    header = ["name", "pixels", "parameters", "with head", "GFLOPs", "tokens"]
    print("\n".join(table(header, rows)))
    print("GFLOPs of one image with the head; a multiply-add counts as two.")
    for line in skipped:
        print(f"left out: {line}")
