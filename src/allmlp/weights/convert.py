"""`mixer convert`: a model in another format, at another image size, or with a new head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from allmlp.io import expand
from allmlp.options import Done, LoadOptions


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(LoadOptions):
    """Write a model in another format, at another image size, or with a new head.

    Examples:
        mixer convert mixer_b16.i21k b16.safetensors
        mixer convert mixer_b16.i1k b16_448 --image-size 448
        mixer convert runs/flowers flowers.npz --format google
        mixer convert jx_mixer_b16_224-76587d61.pth b16.safetensors --num-classes 34
    """

    format: Literal["allmlp", "google", "timm"] | None = None
    """google (arrays that Google's code loads), timm (its names) or allmlp; by default google for
    .npz, else allmlp."""
    num_classes: int | None = None
    """Replace the head by a zero head for this many classes; 0 removes the head."""
    overwrite: bool = False
    """Replace existing files."""


def convert(model: str, output: str, options: ConvertOptions) -> Done:
    from allmlp.models.catalog import in_words  # imports torch, which --help does not need
    from allmlp.models.layers import flops_text
    from allmlp.weights.load import files_of, load_model
    from allmlp.weights.save import check_target, save_model

    path = expand(output)
    format = options.format or ("google" if path.suffix == ".npz" else "allmlp")
    check_target(path, format, overwrite=options.overwrite, inputs=files_of(model))
    net = load_model(model, num_classes=options.num_classes, **options.loading)
    weights = save_model(net, path, format, overwrite=options.overwrite)
    mebibytes = weights.stat().st_size / 2**20
    lines = [
        f"model    {in_words(net.config)}",
        f"         {net.num_parameters:,} parameters, {flops_text(net.config.flops)} per image",
        f"written  {weights} ({format}, {mebibytes:,.1f} MiB)",
    ]
    gelu = {"google": ("tanh", "Google's code"), "timm": ("exact", "timm")}.get(format)
    ours = getattr(net.config, "gelu", "exact")
    if gelu is not None and gelu[0] != ours:
        what = f"{gelu[1]} computes the {gelu[0]} GELU, this model the {ours} one"
        lines.append(f"note     {what}: its logits will differ in the fourth digit")
    print("\n".join(lines))
    return Done({"written": weights, "format": format, "parameters": net.num_parameters})
