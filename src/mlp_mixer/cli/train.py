"""`mixer train`."""

from __future__ import annotations

from mlp_mixer.cli.arguments import (
    Assignments,
    DataName,
    File,
    Folder,
    Number,
    Real,
    Recipe,
    Size,
    Text,
    parse_size,
)


def train(
    recipe: Recipe = None,
    /,
    *,
    data: DataName = None,
    output: Folder = None,
    model: Text = None,
    image_size: Size = None,
    epochs: Number = None,
    batch_size: Number = None,
    learning_rate: Real = None,
    holdout: Real = None,
    fraction: Real = None,
    without: File = None,
    max_bad: Real = None,
    seed: Number = None,
    device: Text = None,
    num_workers: Number = None,
    settings: Assignments = (),
) -> None:
    """Train a Mixer from random weights and write a run folder with the best weights and pictures.

    Examples of use:
        mixer train
        mixer train --data FOLDER --image-size 64
        mixer train --data FOLDER --model mixer_s16 --epochs 100 --output runs/flowers
        mixer train digits --seed 1 --set optimizer.weight_decay=0.05

        mixer train --data 'cifar10_*.parquet' --image-size 32 --fraction 0.1

    FOLDER has train/<class>/*.jpg, with val/ and test/ if you have them, or just <class>/*.jpg.

    Args:
        recipe: digits or scratch; without it digits, and scratch where --data is given.
        data: a folder of class folders or of packed shards, a .csv or .jsonl list, Parquet files,
            hf:owner/name, or digits; with :train[:90%] behind it for a part.
        output: the run folder; the default is runs/<date>_<recipe>.
        model: a name of `mixer models`.
        image_size: what the model sees; the patch must divide it.
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: the highest, after the warm-up.
        holdout: share of each class held out for validation where the data has no val/ (0.1).
        fraction: share of the training images to use, drawn at random (1).
        without: images to leave out, as the flag --drop-list of the verb data check lists them.
        max_bad: largest share of unreadable images at which a run goes on (0.01).
        seed: of the weights, the order of the images and every random number.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
        settings: any other setting, as config.json of a run names it; may be given many times.
    """
    from mlp_mixer.data.sources import names_source
    from mlp_mixer.training.loop import train as run_training
    from mlp_mixer.training.recipes import recipe as named_recipe

    name = recipe or ("digits" if data is None or names_source(data) else "scratch")
    config = named_recipe(name)
    flags = {
        "data.source": data,
        "output": output,
        "model.name": model,
        "model.image_size": parse_size(image_size),
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
        "data.holdout": holdout,
        "data.fraction": fraction,
        "data.without": without,
        "data.max_bad": max_bad,
        "seed": seed,
        "device": device,
        "data.num_workers": num_workers,
    }
    for key, value in flags.items():
        if value is not None:
            config = config.with_value(key, value)
    for assignment in settings:
        config = config.with_setting(assignment)
    run_training(config)
