"""Pre-training of CycleMLP and Vision Permutator on ImageNet-1k, with their authors' settings.

Both are the recipe of DeiT: AdamW, cosine decay to a rate of 1e-5, RandAugment of 2 operations at
magnitude 9, mixup 0.8 or cutmix 1.0 by a coin, noise in a rectangle of every fourth image, label
smoothing 0.1, stochastic depth 0.1, no clipping of the gradient. What is not theirs:

- their RandAugment draws each magnitude around 9 (deviation 0.5) and its operations all grow with
  it (timm's rand-m9-mstd0.5-inc1); here each is 9, by Google's scale of each operation;
- repeated augmentation is left out: CycleMLP's batches hold three versions of each image;
- colour jitter is left out, as timm does beside RandAugment;
- one kind of resizing while training (bilinear); CycleMLP's is bicubic, the Permutator's is drawn;
- pixels on [-1, 1], not less ImageNet's mean and over its deviation;
- the warm-up begins at 0, not at 1e-6;
- the Permutator's 10 last epochs at the lowest rate are part of the cosine;
- evaluation cuts 0.875 out of the image; the Permutator's authors 0.9.

What these cost in accuracy is not measured.
"""

from __future__ import annotations

from allmlp.training.config import (
    AdamW,
    AugmentSettings,
    Cosine,
    DataSettings,
    InceptionCrop,
    ModelSettings,
    Softmax,
    TrainConfig,
)


def _imagenet(
    model: str, *, epochs: int, warmup_epochs: int, batch_size: int, learning_rate: float
) -> TrainConfig:
    """Returns what both share, with their own length, batch and learning rate."""
    return TrainConfig(
        recipe=f"imagenet_{model}",
        model=ModelSettings(name=model, image_size=224, overrides={"stochastic_depth": 0.1}),
        data=DataSettings(source=""),
        augment=AugmentSettings(
            crop=InceptionCrop(area=(0.08, 1.0)),
            randaugment=9,
            random_erasing=0.25,
            mixup=0.8,
            cutmix=1.0,
        ),
        optimizer=AdamW(
            learning_rate=learning_rate,
            weight_decay=0.05,
            clip_norm=0.0,
            schedule=Cosine(final_lr_fraction=1e-5 / learning_rate),
            warmup=warmup_epochs / epochs,
        ),
        loss=Softmax(label_smoothing=0.1),
        epochs=epochs,
        batch_size=batch_size,
        evaluate_every=5,
        checkpoint_every=1000,
    )


def imagenet_cycle_mlp_b1() -> TrainConfig:
    """CycleMLP-B1 on ImageNet-1k; `--model cycle_mlp_b2` and so on for the larger ones.

    mixer train imagenet_cycle_mlp_b1 --data IMAGENET --output runs/imagenet_cycle_mlp_b1

    Expected: 78.9 % top-1 with its authors' augmentation (their README); not run here.

    Without repeated augmentation, with another colour scale and one kind of resizing: what the
    augmentation here lacks of theirs stands at the top of `sibling_recipes.py`.
    """
    return _imagenet(
        "cycle_mlp_b1",
        epochs=300,
        warmup_epochs=5,
        batch_size=1024,
        learning_rate=1e-3,
    )


def imagenet_vip_s7() -> TrainConfig:
    """Vision Permutator s/7 on ImageNet-1k; m/7 takes stochastic depth 0.2, l/7 takes 0.3.

    mixer train imagenet_vip_s7 --data IMAGENET --output runs/imagenet_vip_s7

    Expected: 81.5 % top-1 with its authors' augmentation (their README); not run here.

    With another colour scale and one kind of resizing: what the augmentation here lacks of theirs
    stands at the top of `sibling_recipes.py`.
    """
    return _imagenet(
        "vip_s7",
        epochs=310,
        warmup_epochs=20,
        batch_size=2048,
        learning_rate=2e-3,
    )


SIBLINGS = {recipe.__name__: recipe for recipe in (imagenet_cycle_mlp_b1, imagenet_vip_s7)}
