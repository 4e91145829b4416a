"""`mixer convert`."""

from __future__ import annotations

from allmlp.cli.arguments import Format, Model, Number, ResizeWeights, Size, Target, load_named
from allmlp.errors import UserError, plural


def convert(
    model: Model,
    output: Target,
    /,
    *,
    format: Format = None,
    image_size: Size = None,
    resize_weights: ResizeWeights = None,
    num_classes: Number = None,
    overwrite: bool = False,
) -> None:
    """Write a model in another format, at another image size, or with a new head.

    Examples of use:
        mixer convert mixer_b16.i21k b16.safetensors
        mixer convert mixer_b16.i1k b16_448 --image-size 448
        mixer convert runs/flowers flowers.npz --format google
        mixer convert jx_mixer_b16_224-76587d61.pth b16.safetensors --num-classes 34

    Args:
        model: a run folder, a .safetensors, .npz or .pth file, a name of `mixer models --weights`,
            or hf:owner/name.
        output: a folder or .safetensors file (allmlp, timm), or a .npz file (google).
        format: allmlp, google (arrays that Google's code loads) or timm (its names); without it
            google for .npz, else allmlp.
        image_size: another size than the weights' own.
        resize_weights: how to reach that size: block-diagonal, resample or auto.
        num_classes: put a new zero head for so many classes, unless the weights have just so many;
            0 takes the head off.
        overwrite: replace what is there.
    """
    from allmlp.evaluation.throughput import count_parameters, flops_text
    from allmlp.io import check_not_inputs, expand
    from allmlp.weights.architecture import describe, precisely
    from allmlp.weights.locate import files_of
    from allmlp.weights.store import FORMATS, check_target, save_model

    if format is not None and format not in FORMATS:
        fix = f"Known: {', '.join(FORMATS)}"
        raise UserError(f"unknown format {format!r}", where="--format", fix=fix)
    path = expand(output)
    chosen = format or ("google" if path.suffix == ".npz" else "allmlp")
    check_not_inputs([each for each in check_target(path, chosen) if each], files_of(model))
    check_target(path, chosen, overwrite=overwrite)
    net = load_named(model, image_size, resize_weights, num_classes)
    if num_classes and net.state_dict()["head.weight"].any():
        print(f"head     the trained one, it has {plural(num_classes, 'class')} already")
    written = save_model(net, path, chosen, overwrite=overwrite)
    print(f"model    {describe(net.config)}")
    print(f"         {count_parameters(net):,} parameters, {flops_text(net.config.flops)} an image")
    print(f"written  {written} ({chosen}, {written.stat().st_size / 2**20:,.1f} MiB)")
    for note in precisely(net.config, chosen):
        print(f"note     {note}")
