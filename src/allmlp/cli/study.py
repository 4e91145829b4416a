"""`mixer study data-scale`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from allmlp.cli.arguments import (
    Assignments,
    Number,
    Real,
    RequiredData,
    Size,
    Text,
    changed,
    parse_size,
)
from allmlp.errors import UserError

Names = Annotated[tuple[str, ...], arg(metavar="NAME ...")]
Shares = Annotated[tuple[float, ...], arg(metavar="X ...")]
Draws = Annotated[tuple[int, ...], arg(metavar="N ...")]
Output = Annotated[str, arg(metavar="FOLDER")]
Steps = Annotated[int, arg(metavar="N")]


def data_scale(
    *,
    data: RequiredData,
    few_shot_data: RequiredData,
    models: Names,
    steps: Steps,
    output: Output,
    fractions: Shares = (0.03, 0.1, 0.3, 1.0),
    seeds: Draws = (0,),
    shots: int = 5,
    few_shot_seeds: Draws = (0, 1, 2),
    recipe: str = "scratch",
    image_size: Size = None,
    batch_size: Number = None,
    learning_rate: Real = None,
    holdout: Real = None,
    device: Text = None,
    num_workers: Number = None,
    precision: Text = None,
    settings: Assignments = (),
) -> None:
    """Train models on growing shares of the images, equally long, and compare what they learnt.

    Examples of use:
        mixer study data-scale --data A --few-shot-data B --models mixer_s16 --steps 9000 --output C

    The paper's figure 2, right. Each model is trained on 3, 10, 30 and 100 % of the images for the
    same number of steps; a smaller share is part of a larger one. Of each run the weights with the
    best accuracy on held-out images, the same for all, are measured by linear few-shot accuracy on
    other data. The same command goes on where it was stopped.

    Args:
        data: to train on, any source that the verb train reads.
        few_shot_data: to measure on, with images to learn from and others to test.
        models: names of `mixer models`.
        steps: updates of the weights, the same for every run.
        output: the folder of the study.
        fractions: shares of the training images.
        seeds: of the draw, the weights and the order of images; a run for each.
        shots: images a class of the few-shot measurement.
        few_shot_seeds: of the draws of these.
        recipe: all other settings, but not its model's sizes; a name of docs/recipes.md.
        image_size: what the models see.
        batch_size: images a step.
        learning_rate: the highest, after the warm-up.
        holdout: share of each class held out for validation where the data has no val/ (0.1).
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
        precision: float32 or bfloat16 products.
        settings: any other setting, for all runs, as config.json of a run names it.
    """
    from allmlp.studies.data_scale import data_scale as run_study
    from allmlp.training.recipes import recipe as named_recipe

    beside = {"model.name": "--models", "seed": "--seeds", "data.fraction_seed": "--seeds"}
    beside |= {"data.fraction": "--fractions", "epochs": "--steps", "output": "--output"}
    for each in settings:
        key = each.partition("=")[0].strip()
        if key in beside:
            what = f"--set {key} has no effect beside {beside[key]}"
            raise UserError(what, fix="Leave it out")
    config = named_recipe(recipe)
    if config.model.weights is not None:
        known = "for example scratch, cifar10 or jft_b32"
        what = f"{recipe} begins with trained weights; the study trains from random ones"
        raise UserError(what, where="--recipe", fix=known)
    # The recipe's sizes belong to its own model; another name takes them away.
    config = config.with_value("model.name", "any")
    flags = {
        "data.source": data,
        "output": output,
        "steps": steps,
        "model.image_size": parse_size(image_size),
        "batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
        "data.holdout": holdout,
        "device": device,
        "data.num_workers": num_workers,
        "precision": precision,
    }
    run_study(
        changed(config, flags, settings),
        few_shot_data,
        models=models,
        fractions=fractions,
        seeds=seeds,
        shots=shots,
        few_shot_seeds=few_shot_seeds,
    )
