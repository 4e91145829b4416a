"""`mixer train`."""

from __future__ import annotations

from allmlp.cli.arguments import (
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
    steps: Number = None,
    batch_size: Number = None,
    learning_rate: Real = None,
    holdout: Real = None,
    fraction: Real = None,
    without: File = None,
    max_bad: Real = None,
    seed: Number = None,
    device: Text = None,
    num_workers: Number = None,
    precision: Text = None,
    compile: Text = None,
    sharding: Text = None,
    resume: Folder = None,
    settings: Assignments = (),
) -> None:
    """Train a model from random weights and write a run folder with the best weights and pictures.

    Examples of use:
        mixer train
        mixer train --data FOLDER --image-size 64
        mixer train --data FOLDER --model mixer_s16 --epochs 100 --output runs/flowers
        mixer train digits --seed 1 --set optimizer.weight_decay=0.05

        mixer train cifar10 --data 'cifar10_*.parquet' --output runs/cifar10
        mixer train --resume runs/cifar10

    A run that was stopped goes on with --resume, or with the same command and --output again; its
    losses are those that it would have had.

    FOLDER has train/<class>/*.jpg, with val/ and test/ if you have them, or just <class>/*.jpg.

    Args:
        recipe: a name of docs/recipes.md, such as cifar10 or imagenet_b16; without it digits, and
            scratch where --data is given.
        data: a folder of class folders or of packed shards, a .csv or .jsonl list, Parquet files,
            hf:owner/name, or digits; with :train[:90%] behind it for a part.
        output: the run folder; the default is runs/<date>_<recipe>.
        model: a name of `mixer models`.
        image_size: what the model sees; the patch must divide it.
        epochs: passes over the training images.
        steps: updates of the weights, in place of --epochs.
        batch_size: images a step.
        learning_rate: the highest, after the warm-up.
        holdout: share of each class held out for validation where the data has no val/ (0.1).
        fraction: share of the training images to use, drawn at random (1).
        without: images to leave out, as the flag --drop-list of the verb data check lists them.
        max_bad: largest share of unreadable images at which a run goes on (0.01); up to 5 images
            stop no run, unless it is 0.
        seed: of the weights, the order of the images and every random number.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
        precision: float32 or bfloat16 products; auto takes what the processor is fast at.
        compile: on, off or auto.
        sharding: none or full, how several processes share the state; see docs/cluster.md.
        resume: the folder of a run to go on with; its own settings are used.
        settings: any other setting, as config.json of a run names it; may be given many times.
    """
    from dataclasses import replace

    from allmlp.cli.arguments import changed
    from allmlp.data.sources import names_source
    from allmlp.errors import UserError
    from allmlp.training.loop import train as run_training
    from allmlp.training.recipes import recipe as named_recipe
    from allmlp.training.resume import check_same, config_of

    flags = {
        "data.source": data,
        "output": output,
        "model.name": model,
        "model.image_size": parse_size(image_size),
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
        "data.holdout": holdout,
        "data.fraction": fraction,
        "data.without": without,
        "data.max_bad": max_bad,
        "seed": seed,
        "device": device,
        "data.num_workers": num_workers,
        "precision": precision,
        "compile": compile,
        "sharding": sharding,
    }
    if resume is not None:
        if output is not None or recipe is not None:
            given = "--output" if output is not None else f"the recipe {recipe}"
            raise UserError(f"--resume goes on with a run as it is, and {given} has no effect")
        old = config_of(resume)
        config = changed(old, flags, settings)
        check_same(old, config)
        run_training(replace(config, output=resume))
        return
    name = recipe or ("digits" if data is None or names_source(data) else "scratch")
    run_training(changed(named_recipe(name), flags, settings))
