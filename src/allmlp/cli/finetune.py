"""`mixer finetune`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

from allmlp.cli.arguments import (
    Assignments,
    Folder,
    Number,
    Rates,
    Real,
    RequiredData,
    ResizeWeights,
    Seeds,
    Size,
    Text,
    changed,
    parse_size,
)

Checkpoint = Annotated[Positional[str], arg(metavar="CHECKPOINT")]


def finetune(
    checkpoint: Checkpoint,
    /,
    *,
    data: RequiredData,
    recipe: Text = None,
    output: Folder = None,
    image_size: Size = None,
    resize_weights: ResizeWeights = None,
    steps: Number = None,
    epochs: Number = None,
    batch_size: Number = None,
    learning_rate: Real = None,
    grid: Rates = None,
    seeds: Seeds = (),
    holdout: Real = None,
    device: Text = None,
    num_workers: Number = None,
    precision: Text = None,
    compile: Text = None,
    sharding: Text = None,
    settings: Assignments = (),
) -> None:
    """Go on training from a checkpoint on your own images, at any image size.

    Examples of use:
        mixer finetune mixer_b16.i21k --data FOLDER --output runs/mine
        mixer finetune mixer_b16.i21k --data FOLDER --image-size 448 --steps 200 --batch-size 32
        mixer finetune runs/cifar10 --data FLOWERS --image-size 64 --grid --seeds 0 1 2
        mixer finetune mixer_b16.i21k --data FOLDER --set model.trained=head

    The rows of the head are kept for classes that the checkpoint knows by name; other classes begin
    with zeros. With --grid the learning rate is chosen on held-out training images, and the
    final run, one for each of --seeds, takes the best: their mean and standard deviation are told.
    The same command with the same --output goes on where it was stopped.

    Args:
        checkpoint: a run folder, a weights file, a name of `mixer models --weights`, or
            hf:owner/name.
        data: a folder, list, Parquet files, shards or hf:owner/name, as for training.
        recipe: finetune_imagenet, finetune_cifar, finetune_pets, finetune_flowers or finetune_vtab;
            without it the BiT-HyperRule, by the number of training images.
        output: the run folder; the default is runs/<date>_<recipe>. --grid and several --seeds
            need one.
        image_size: what the model sees; another size than the checkpoint's grows it.
        resize_weights: block-diagonal or resample; auto takes the first where both sides grow
            by whole factors.
        steps: updates of the weights.
        epochs: passes over the training images, in place of --steps; about 20 evaluations.
        batch_size: images a step.
        learning_rate: the highest, after the warm-up.
        grid: learning rates to choose from; without values those of the recipe.
        seeds: of the final runs (0).
        holdout: share of the training images to judge by, for --grid and where the data has no
            val/; the default is the recipe's for --grid, and 0.1.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
        precision: float32 or bfloat16 products; auto takes what the processor is fast at.
        compile: on, off or auto.
        sharding: none or full, how several processes share the state; see docs/cluster.md.
        settings: any other setting, as config.json of a run names it; may be given many times.
    """
    from allmlp.data.sources import open_splits
    from allmlp.errors import UserError
    from allmlp.finetuning import finetune as run_study
    from allmlp.training.finetuning_recipes import FINETUNING, LEARNING_RATES, finetune_for
    from allmlp.training.loop import train as run_training
    from allmlp.training.recipes import recipe as named_recipe

    if grid is not None and learning_rate is not None:
        what = f"--learning-rate {learning_rate:g} has no effect beside --grid"
        raise UserError(what, fix=f"--grid {learning_rate:g}, or leave --grid out")
    if resize_weights is not None and image_size is None:
        what = "--resize-weights says how to reach another image size, and none is given"
        raise UserError(
            what, where="--resize-weights", fix="Add --image-size, or leave --resize-weights out"
        )
    if recipe is not None and recipe not in FINETUNING:
        named_recipe(recipe)  # an unknown one is refused there, with the nearest names
        what = f"{recipe} trains from random weights"
        raise UserError(what, where="--recipe", fix=f"Known here: {', '.join(FINETUNING)}")
    if recipe is not None:
        config = named_recipe(recipe)
    else:
        splits = open_splits(data)
        if "train" not in splits:
            fix = f"Known there: {', '.join(splits)}. Give a source that has both"
            raise UserError("the data has no train split", where=data, fix=fix)
        config = finetune_for(len(splits["train"]))
    for name, is_chosen in (("optimizer.learning_rate", grid is not None), ("seed", bool(seeds))):
        if is_chosen and any(each.partition("=")[0].strip() == name for each in settings):
            flag = "--seeds" if name == "seed" else "--grid"
            raise UserError(
                f"--set {name} has no effect beside {flag}", fix="Leave one of them out"
            )
    flags = {
        "model.weights": checkpoint,
        "model.image_size": parse_size(image_size),
        "model.growth": resize_weights,
        "data.source": data,
        "data.holdout": holdout,
        "output": output,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
        "device": device,
        "data.num_workers": num_workers,
        "precision": precision,
        "compile": compile,
        "sharding": sharding,
    }
    config = changed(config, flags, settings)
    if seeds:
        config = config.with_value("seed", seeds[0])
    if grid is None and len(seeds) < 2:
        run_training(config)
        return
    rates = () if grid is None else grid or LEARNING_RATES[config.recipe]
    run_study(config, grid=rates, seeds=seeds or (config.seed,))
