"""Fine-tuning from a checkpoint: the paper's appendix C, Google's code, and the BiT-HyperRule.

All of them: SGD with momentum 0.9 and a batch of 512, no weight decay, the gradient clipped at norm
1, linear warm-up and cosine decay to 0, softmax loss, no stochastic depth, every parameter trained
and a new head of zeros. The recipe names no model: the checkpoint brings it.

The crop is where paper and code differ. The paper's models resized the image and cut out a random
square, and Inception crops "did not lead to any improvements" on weights of JFT-300M; Google's
released code cuts Inception crops, and the figures in its README were made with them. Here it is
the Inception crop, of 5 to 100 % of the image; `--set augment.crop=none` leaves only the flip.

The paper prints the steps; the warm-up is that of Google's codes (big_vision and scenic). The rate
is that of vit_jax, or 0.01 where it has none, and the paper chose the best of `LEARNING_RATES` by
the share `HOLDOUTS` of the training images, then trained on all of them: `--grid` does both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from allmlp.training.config import (
    SGD,
    AugmentSettings,
    DataSettings,
    InceptionCrop,
    ModelSettings,
    NoCrop,
    TrainConfig,
)

_GRID = (0.003, 0.01, 0.03, 0.06)

# Training images below which a set is "small", and "medium" (bit_hyperrule.py).
_SMALL, _MEDIUM = 20_000, 500_000


def _finetune(
    recipe: str,
    *,
    steps: int = 500,
    warmup: int = 100,
    evaluate_every: int = 100,
    learning_rate: float = 0.03,
    ema_decay: float = 0.0,
    resize: Any = "resmall-crop",
    **augment: Any,
) -> TrainConfig:
    # A checkpoint of one's own brings the stochastic depth that it was pre-trained with.
    overrides = {"stochastic_depth": 0.0}
    return TrainConfig(
        recipe=recipe,
        model=ModelSettings(name="", image_size=None, weights="", overrides=overrides),
        data=DataSettings(source="", resize=resize),
        augment=AugmentSettings(**{"crop": InceptionCrop(), **augment}),
        optimizer=SGD(learning_rate=learning_rate, warmup=warmup, ema_decay=ema_decay),
        epochs=None,
        steps=steps,
        batch_size=512,
        evaluate_every=evaluate_every,
    )


def finetune_for(num_images: int, learning_rate: float = 0.01) -> TrainConfig:
    """Returns the BiT-HyperRule's settings for this number of training images.

    Fewer than 20,000: 500 steps, 100 of warm-up, no mixup. Fewer than 500,000: 10,000 and 500
    steps, mixup 0.1. More: 20,000 and 500 steps, mixup 0.1. (For Mixers the paper dropped mixup
    here: it brought no consistent gain, on weights of JFT-300M.) Instead of the rule's stepwise
    decay from 0.003 it takes the paper's cosine from 0.01, which is big_vision's default.
    """
    steps, warmup, mixup = 20_000, 500, 0.1
    if num_images < _MEDIUM:
        steps = 10_000
    if num_images < _SMALL:
        steps, warmup, mixup = 500, 100, 0.0
    return _finetune(
        "finetune",
        steps=steps,
        warmup=warmup,
        mixup=mixup,
        learning_rate=learning_rate,
        evaluate_every=max(100, steps // 20),
    )


def finetune() -> TrainConfig:
    """Any images: the BiT-HyperRule, which goes by their number; here that of a small set.

    mixer finetune mixer_b16.i21k --data FOLDER --output runs/mine

    Expected: not measured. Large images gain from `--image-size 448`, at 5 times the cost.
    """
    return finetune_for(1)


def finetune_imagenet() -> TrainConfig:
    """ImageNet-1k from weights of a larger set.

    mixer finetune mixer_l16.i21k --recipe finetune_imagenet --data IMAGENET --image-size 448

    Expected: 80.64 % top-1 with mixer_b16.i21k and 82.89 % with mixer_l16.i21k at 224 pixels (the
    paper, Table 3), 84.15 % with the latter at 448 and `--set data.resize=resize-crop` (Table 2).
    """
    return _finetune("finetune_imagenet", steps=20_000, warmup=500, evaluate_every=1000)


def finetune_cifar() -> TrainConfig:
    """CIFAR-10 or CIFAR-100, enlarged to the model's size.

    mixer finetune mixer_b16.i21k --recipe finetune_cifar --data CIFAR10

    Expected, CIFAR-10 at 224 pixels: 96.82 % with mixer_b16.i21k, 98.34 % with mixer_l16.i21k,
    96.72 and 96.59 % with those of ImageNet-1k (README of google-research/vision_transformer, from
    98 % of the training images at this rate, on the first 9,728 of the 10,000 test images).
    """
    return _finetune("finetune_cifar", steps=10_000, warmup=500, evaluate_every=500)


def finetune_pets() -> TrainConfig:
    """Oxford-IIIT Pets, 3,680 training images of 37 breeds.

    mixer finetune mixer_b16.i21k --recipe finetune_pets --data PETS

    Expected: published only within the mean over ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers:
    92.50 % with mixer_b16.i21k, 93.63 % with mixer_l16.i21k (the paper, Table 3).
    """
    return _finetune("finetune_pets")


def finetune_flowers() -> TrainConfig:
    """Oxford Flowers-102, 20 images per class with the validation split, 10 without.

    mixer finetune mixer_b16.i21k --recipe finetune_flowers --data FLOWERS

    Expected: published only within the mean over ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers:
    92.50 % with mixer_b16.i21k, 93.63 % with mixer_l16.i21k (the paper, Table 3).
    """
    return _finetune("finetune_flowers")


def finetune_vtab() -> TrainConfig:
    """A task of VTAB-1k: 1,000 training images.

    mixer finetune mixer_l16.i21k --recipe finetune_vtab --data TASK

    Expected: 74.95 % in the mean over the 19 tasks, with mixer_l16.i21k (the paper, Table 2; 448
    pixels where the task's images are large). Nothing is cut or mirrored, for in some tasks the
    place of an object is the answer; where it is not, Google cut and mirrored too:
    `--set augment.crop=inception --set augment.flip=true`.
    """
    return _finetune(
        "finetune_vtab",
        steps=2500,
        warmup=200,
        evaluate_every=500,
        learning_rate=0.01,
        crop=NoCrop(),
        flip=False,
        resize="squash",
    )


def finetune_mixup() -> TrainConfig:
    """Appendix A.2: mixup of strength 0.1, which is BiT's, on whole images.

    mixer finetune mixer_b16.i21k --recipe finetune_mixup --data FOLDER --grid

    Expected: no consistent gain, with weights of JFT-300M (the paper). Compare with
    `--set augment.mixup=0`.
    """
    return _finetune("finetune_mixup", mixup=0.1, crop=NoCrop())


def finetune_average() -> TrainConfig:
    """Appendix A.2: Polyak averaging of the weights, by 0.9999 per step as in the ViT paper.

    mixer finetune mixer_b16.i21k --recipe finetune_average --data FOLDER --grid

    Expected: no consistent gain, with weights of JFT-300M (the paper). Compare with
    `--set optimizer.ema_decay=0`.
    """
    return _finetune("finetune_average", ema_decay=0.9999, crop=NoCrop())


def finetune_inception() -> TrainConfig:
    """Appendix A.2: Inception crops, of 5 to 100 % of the image.

    mixer finetune mixer_b16.i21k --recipe finetune_inception --data FOLDER --grid

    Expected: no gain, with weights of JFT-300M (the paper). Compare with
    `--set augment.crop=none`.
    """
    return _finetune("finetune_inception")


# Recipe -> the learning rates of the paper's grid (appendix C; the generic recipe takes the widest)
# and the fraction of the training images that it chooses by (of VTAB's 1,000 it is 200).
_GRIDS: dict[Callable[[], TrainConfig], tuple[tuple[float, ...], float]] = {
    finetune: (_GRID, 0.1),
    finetune_imagenet: (_GRID, 0.01),
    finetune_cifar: (_GRID, 0.02),
    finetune_pets: (_GRID, 0.1),
    finetune_flowers: (_GRID, 0.1),
    finetune_vtab: ((0.003, 0.01, 0.03), 0.2),
    finetune_mixup: (_GRID, 0.1),
    finetune_average: (_GRID, 0.1),
    finetune_inception: (_GRID, 0.1),
}
FINETUNING = {recipe.__name__: recipe for recipe in _GRIDS}
LEARNING_RATES = {recipe.__name__: rates for recipe, (rates, _) in _GRIDS.items()}
HOLDOUTS = {recipe.__name__: holdout for recipe, (_, holdout) in _GRIDS.items()}
