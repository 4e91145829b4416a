"""`mixer permute`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import UseAppendAction, arg

from allmlp.cli.arguments import (
    Assignments,
    DataName,
    Number,
    Real,
    RequiredData,
    Seeds,
    Size,
    Text,
    changed,
    overrides_of,
    parse_size,
)

OwnSettings = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")]


def permute(
    *,
    data: RequiredData,
    output: str,
    model: Text = None,
    recipe: str = "cifar10_compare",
    image_size: Size = None,
    patch_size: Number = None,
    comparison: str = "small_resnet",
    comparison_set: OwnSettings = (),
    permutation_seed: int = 0,
    seeds: Seeds = (0,),
    few_shot_data: DataName = None,
    shots: int = 5,
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
    """Train on shuffled pixels: figure 4 of the paper, a Mixer against a convolutional network.

    Examples of use:
        mixer permute --data 'cifar10_*.parquet' --output runs/permute --steps 2000
        mixer permute --data FOLDER --model mixer_b16 --recipe scratch --output runs/permute
        mixer permute --data FOLDER --output runs/permute --comparison timm:resnetv2_50x1_bit

    Each network is trained three times with the same seed: on pictures as they are; with the
    patches and the pixels within them shuffled, alike in all pictures; with all pixels shuffled
    alike. A table tells the accuracies and the relative drops, and permutation.png shows the curves
    under examples of the pictures. The same command goes on where it was stopped.

    Args:
        data: any source that the verb train reads.
        output: the folder of the study.
        model: the network; the default is the recipe's.
        recipe: whose settings the runs have; the optimiser must fit both networks.
        image_size: what the networks see.
        patch_size: side of the shuffled patches in pixels; the default is the model's own patch.
        comparison: the other network: small_resnet, timm:NAME, or none.
        comparison_set: a setting of it, such as width=40; may be given many times.
        permutation_seed: of the permutations.
        seeds: of weights and data order; each is a run of its own.
        few_shot_data: measure linear few-shot accuracy on this data too.
        shots: training images a class for that.
        epochs: passes over the training images.
        steps: updates of the weights, in place of --epochs.
        batch_size: images a step.
        learning_rate: the highest, after the warm-up.
        holdout: share of the training images to validate on, where the data has no val/.
        evaluate_every: epochs, or steps with --steps, between the points of the curves.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
        precision: float32 or bfloat16 products; auto takes what the processor is fast at.
        settings: any other setting, as config.json of a run names it; may be given many times.
    """
    from allmlp.errors import UserError
    from allmlp.studies.permutation import permutation
    from allmlp.training.recipes import recipe as named_recipe

    if shots != 5 and few_shot_data is None:
        raise UserError(f"--shots {shots} has no effect without --few-shot-data", where="--shots")
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
    permutation(
        config,
        comparison=None if comparison == "none" else comparison,
        comparison_overrides=overrides_of(comparison_set, "--comparison-set"),
        patch_size=patch_size,
        permutation_seed=permutation_seed,
        seeds=seeds,
        few_shot_data=few_shot_data,
        shots=shots,
    )
