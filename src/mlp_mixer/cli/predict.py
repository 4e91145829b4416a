"""`mixer predict`."""

from __future__ import annotations

from mlp_mixer.cli.arguments import (
    File,
    GrowthName,
    Inputs,
    Model,
    Number,
    Size,
    load_named,
    warn_of_bad,
)


def predict(
    model: Model,
    images: Inputs,
    /,
    *,
    top_k: int = 5,
    image_size: Size = None,
    growth: GrowthName = None,
    output: File = None,
    batch_size: int = 64,
    device: str = "auto",
    num_workers: Number = None,
) -> int:
    """Classify images: files, folders and patterns.

    Examples of use:
        mixer predict runs/flowers photo.jpg
        mixer predict runs/flowers FOLDER 'more/*.png' --output predictions.csv
        mixer predict runs/digits digits:test --top-k 1
        mixer predict mixer_b16.i1k photo.jpg

    Args:
        model: a run folder, a .safetensors, .npz or .pth file, a name of `mixer models --weights`,
            or hf:owner/name.
        images: files, folders (to any depth), patterns; or one source of data: digits:test,
            list.csv, FOLDER:test, Parquet files, shards, hf:owner/name.
        top_k: classes for each image.
        image_size: look at the images at another size than the model's own.
        growth: how to get there: block-diagonal, resample or auto.
        output: a file to write to, its ending says how: .csv, .json or .jsonl.
        batch_size: images a batch.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
    """
    from mlp_mixer.console import Reporter, table
    from mlp_mixer.data.items import BadImage
    from mlp_mixer.deploy.predict import check_output, find_images
    from mlp_mixer.deploy.predict import predict as classify

    report = Reporter()
    if output is not None:
        check_output(output)
    source = find_images(images)
    net = load_named(model, image_size, growth)
    with report.progress(len(source), "images") as bar:
        predictions = classify(
            net,
            source,
            top_k=top_k,
            output=output,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            on_batch=bar.advance,
        )
    good = [each for each in predictions if each.error is None]
    rows = [[each.path, *(f"{name} {share:.1%}" for name, share in each.classes)] for each in good]
    most = 40
    if rows:
        ranks = [f"{rank}." for rank in range(1, len(rows[0]))]
        for line in table(["image", *ranks], rows[:most], left=len(rows[0])):
            report.say(line)
    if len(rows) > most:
        where = f"in {output}" if output else "with --output FILE"
        report.say(f"... and {len(rows) - most:,} more, {where}")
    if output is not None:
        report.say(f"written  {output}: {len(predictions):,} images")
    bad = [
        BadImage(at, each.path, each.error)
        for at, each in enumerate(predictions)
        if each.error is not None
    ]
    code = warn_of_bad(bad)
    return 2 if not good else code
