"""`mixer study ablations`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from allmlp.cli.arguments import (
    Assignments,
    Number,
    Real,
    RequiredData,
    Seeds,
    Size,
    Text,
    changed,
    parse_size,
)

Variants = Annotated[tuple[str, ...], arg(help_behavior_hint="(default: all)", metavar="NAME ...")]


def ablations(
    *,
    data: RequiredData,
    output: str,
    variants: Variants = (),
    model: Text = None,
    recipe: str = "cifar10_compare",
    image_size: Size = None,
    seeds: Seeds = (0,),
    epochs: Number = None,
    steps: Number = None,
    batch_size: Number = None,
    learning_rate: Real = None,
    holdout: Real = None,
    evaluate_every: Number = None,
    device: Text = None,
    num_workers: Number = None,
    precision: Text = None,
    settings: Assignments = (),
) -> None:
    """Train the variants of appendix A.1 under one budget: accuracy, parameters, FLOPs, images/s.

    Examples of use:
        mixer study ablations --data 'cifar10_*.parquet' --output runs/ablations --steps 2000
        mixer study ablations --data FOLDER --output runs/a --variants shared untied --seeds 0 1 2

    The variants: shared (the paper's Mixer), untied (weights for each channel), grouped-2 and
    grouped-4 (so many channels at once), views-2 and views-4 (learned views), pyramid (a quarter of
    the tokens from the middle on). The same command goes on where it was stopped.

    Args:
        data: any source that the verb train reads.
        output: the folder of the study.
        variants: which of them.
        model: a Mixer; the default is the recipe's.
        recipe: whose settings all runs have.
        image_size: what the networks see.
        seeds: of weights and data order; each is a run of its own.
        epochs: passes over the training images.
        steps: updates of the weights, in place of --epochs.
        batch_size: images a step.
        learning_rate: the highest, after the warm-up.
        holdout: share of the training images to validate on, where the data has no val/.
        evaluate_every: epochs, or steps with --steps, between evaluations.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
        precision: float32 or bfloat16 products; auto takes what the processor is fast at.
        settings: any other setting, as config.json of a run names it; may be given many times.
    """
    from allmlp.studies.ablations import ablations as run_study
    from allmlp.training.recipes import recipe as named_recipe

    flags = {
        "model.name": model,
        "model.image_size": parse_size(image_size),
        "data.source": data,
        "data.holdout": holdout,
        "output": output,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "evaluate_every": evaluate_every,
        "optimizer.learning_rate": learning_rate,
        "device": device,
        "data.num_workers": num_workers,
        "precision": precision,
    }
    config = changed(named_recipe(recipe), flags, settings)
    run_study(config, variants=variants or None, seeds=seeds)
