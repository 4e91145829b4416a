"""The model card: what best/README.md says, written from the run."""

from __future__ import annotations

import shlex

from mlp_mixer.evaluation.accuracy import Evaluation
from mlp_mixer.evaluation.throughput import count_parameters, flops_text
from mlp_mixer.models.layers import ImageClassifier
from mlp_mixer.training.config import TrainConfig
from mlp_mixer.training.dataset import Splits

_CARD = """---
library_name: mlp_mixer
pipeline_tag: image-classification
tags: [mlp-mixer, image-classification]
---

# {title}

{architecture}, {summary}: {parameters:,} parameters, {flops} an image.
Input: {height}x{width} pixels.
It tells apart {num_classes} classes: {classes}.

## Accuracy

| images | split | top-1 | top-5 | loss |
| ---: | --- | ---: | ---: | ---: |
{results}

{chosen}

## Use

```python
import mlp_mixer as mm

for prediction in mm.predict({quoted}, ["photo.jpg"]):
    print(prediction.path, prediction.classes)
```

```
mixer predict {folder} photo.jpg
```

Images of any size and mode are turned upright and prepared as the model carries along:
{preprocessing}.

## Training

Recipe `{recipe}`, seed {seed}: {length} of {train:,} images in batches of {batch};
{start}{optimizer}, learning rate {rate:g}, weight decay {decay:g}.
Every setting is in the run's `config.json`.

## Limits

It has only ever seen the images named above: for pictures of another kind, from another camera or
of other classes its answers mean nothing, and its probabilities are not calibrated.
Architecture: MLP-Mixer, Tolstikhin et al. 2021, arXiv 2105.01601.
"""


def model_card(
    model: ImageClassifier,
    config: TrainConfig,
    splits: Splits,
    folder: str,
    validation: Evaluation | None,
    test: Evaluation | None,
) -> str:
    """Returns the text of the card, in Markdown with the header that model hubs read."""
    evaluations = [evaluation for evaluation in (validation, test) if evaluation is not None]
    rows = [
        f"| {len(each.labels):,} | {each.data} | {each.top1:.2%} | "
        f"{'-' if each.top5 is None else f'{each.top5:.2%}'} | {each.loss:.4f} |"
        for each in evaluations
    ]
    chosen = "The weights are those of the best validation accuracy;\n"
    if splits.validation is None:
        chosen = "The weights are those of the last step;\n"
    if splits.test:
        chosen += "the test images are looked at once, at the end."
    elif splits.validation is not None:
        chosen += "there were no test images, so expect somewhat less on new ones."
    else:
        chosen += "all images were trained on, and none is left to measure the accuracy by."
    names = splits.train.class_names
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    height, width = model.config.image_size
    assert model.preprocessing is not None
    return _CARD.format(
        title=f"{type(model).__name__} on {config.data.source}",
        architecture=type(model).__name__,
        parameters=count_parameters(model),
        flops=flops_text(model.config.flops),
        summary=model.config.summary(),
        height=height,
        width=width,
        num_classes=len(names),
        classes=shown,
        results="\n".join(rows),
        chosen=chosen,
        folder=shlex.quote(folder),
        quoted=repr(folder),
        preprocessing=model.preprocessing.summary(),
        recipe=config.recipe,
        seed=config.seed,
        length=f"{config.steps:,} steps" if config.epochs is None else f"{config.epochs} epochs",
        start="" if config.model.weights is None else f"from the weights {config.model.weights};\n",
        train=len(splits.train),
        batch=config.batch_size,
        optimizer=config.optimizer.name,
        rate=config.optimizer.learning_rate,
        decay=config.optimizer.weight_decay,
    )
