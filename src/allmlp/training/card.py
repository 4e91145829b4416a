"""The model card (best/README.md), generated from the run."""

from __future__ import annotations

import functools
import json
import os
import re
from typing import Any

from allmlp.data.source_spec import parse_name
from allmlp.data.sources.hub import PREFIX
from allmlp.decision import Decision
from allmlp.evaluation.calibration import summary
from allmlp.evaluation.metrics import METRICS, Evaluation
from allmlp.models.catalog import architecture_name, family_of
from allmlp.models.layers import (
    ImageClassifier,
    flops_text,
    preprocessing_of,
)
from allmlp.models.timm_model import TimmConfig
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Splits
from allmlp.weights.checkpoints import find_checkpoint

_HUB_METRICS = {
    "mean_average_precision": "mean_average_precision",
    "top1": "accuracy",
    "balanced_accuracy": "balanced_accuracy",
    "macro_f1": "f1",
}
_USE = """## Use

{place}, with the package allmlp installed:

```python
import allmlp as am

for prediction in am.predict("{source}", ["photo.jpg"]):
    print(prediction.path, prediction.classes)
```

```
mixer predict {source} photo.jpg
```
"""
_UNSTATED = "# license: not stated; see the end of this page"
# Of the weights it began with -> as the hub names it.
_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}
_CARD = """---
{header}
---

# {title}

{architecture}, {summary}: {parameters:,} parameters, {flops} per image.
Input: {height}x{width} pixels.
It distinguishes {num_classes} classes: {classes}.

## Accuracy

| images | split |{titles}
| ---: | --- |{lines}
{results}

{chosen}

{probabilities}{use}

Images of any size and mode are turned upright and preprocessed as the model requires:
{preprocessing}.

## Training

{trained}
Every setting is in the run's `config.json`.

## Limits

It was trained only on the images named above: for images of another kind, from another camera or
of other classes its answers and probabilities mean nothing.

Architecture: {architecture}, {paper}.

Licence: the code that made it, allmlp, is Apache-2.0. That of these weights is the choice of
whoever trained them, and depends on the images{begun}.
"""

PROBABILITIES = "## Probabilities"


def probabilities_section(decision: Decision) -> str:
    """Returns the card's section on how sure the answers are, and what was measured."""
    lines = [f"- {line}." for line in summary(decision)]
    if decision.temperature == 1.0:
        lines.insert(0, "- The probabilities are not calibrated.")
    return "\n".join([PROBABILITIES, "", *lines, "", ""])


def public_name(data: str, name: str) -> str:
    """Returns the name of a part of the data without local folders."""
    base = parse_name(data).base
    called = base if base.startswith(PREFIX) else os.path.basename(os.path.abspath(base))
    return called + name.removeprefix(base) if name.startswith(base) else name


def model_card(
    model: ImageClassifier,
    config: TrainConfig,
    splits: Splits,
    validation: Evaluation | None,
    test: Evaluation | None,
) -> str:
    """Returns the model card in Markdown, with the metadata header that model hubs read.

    It contains no local paths, so that the folder can be published as is.
    """
    data, weights = config.data.source, config.model.weights
    base, public = parse_name(data).base, functools.partial(public_name, data)
    evaluations = [evaluation for evaluation in (validation, test) if evaluation is not None]
    found = [dict(evaluation.figures()) for evaluation in evaluations]
    shown = [metric for metric in METRICS if found and metric.name in found[0]]
    rows = [
        f"| {len(evaluation.labels):,} | {public(evaluation.data)} | "
        f"{' | '.join(f'{values[m.name]:{m.format}}' for m in shown)} |"
        for evaluation, values in zip(evaluations, found, strict=True)
    ]
    by = "accuracy" if config.best_by == "top1" else config.best_by.replace("_", " ")
    keeps_last = splits.validation is None or config.data.fold is not None
    best = "the last step" if keeps_last else f"the best validation {by}"
    chosen = "all images were trained on, none are left to measure the accuracy."
    if splits.test:
        chosen = "the test images are measured once, at the end."
    elif config.data.fold is not None:
        chosen = "the held-out fold is measured once, at the end."
    elif splits.validation is not None:
        chosen = "there were no test images, so expect somewhat less on new ones."
    names = splits.train.class_names
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    height, width = model.config.image_size
    tag, architecture, paper = _architecture(model)
    title = f"{architecture} on {public(data)}"
    start = begun = licence = probe = ""
    optimizer = config.optimizer
    if weights is not None:
        # Only the last part of a path.
        name = os.path.basename(os.path.normpath(weights).removesuffix(f"{os.sep}best"))
        name = weights if weights.startswith((PREFIX, "timm:")) else name
        known = find_checkpoint(weights)
        start = f"from the weights {name};\n"
        probe = f"A linear probe: the head alone was fitted to the features that {name}\n"
        probe += f"gives of {len(splits.train):,} images, without augmentation."
        begun = f" and on the weights that it began with, {name}"
        if known is not None:
            begun += f" ({known.licence})"
            licence = _LICENCES.get(known.licence, "other")
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": public(evaluation.data), "type": public(base)},
            "metrics": [
                {"type": _HUB_METRICS[m.name], "name": m.title, "value": round(values[m.name], 6)}
                for m in shown
                if m.name in _HUB_METRICS
            ],
        }
        for evaluation, values in zip(evaluations, found, strict=True)
    ]
    header = {
        **_kind(tag),
        "license": licence,
        "datasets": [_on_hub(base)] if base.startswith(PREFIX) else None,
        "base_model": None if weights is None else _base_model(weights),
        "metrics": [results[0]["metrics"][0]["type"]] if results else None,
        "model-index": [{"name": title, "results": results}] if results else None,
    }
    steps = (
        f"Recipe `{config.recipe}`, seed {config.seed}: {config.length} of {len(splits.train):,} "
        f"images in batches of\n{config.batch_size}; {start}{optimizer.name}, learning rate\n"
        f"{optimizer.learning_rate:g}, weight decay {getattr(optimizer, 'weight_decay', 0.0):g}."
    )
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items() if value]
    return _CARD.format(
        header="\n".join(lines if licence else [*lines, _UNSTATED]),
        use=_USE.format(place='In this folder ("."; elsewhere give its path)', source=".").strip(),
        title=title,
        architecture=architecture,
        paper=paper,
        begun=begun,
        parameters=model.num_parameters,
        flops=flops_text(model.config.flops),
        summary=model.config.summary(),
        height=height,
        width=width,
        num_classes=len(names),
        classes=", ".join(names[:20]) + more,
        titles="".join(f" {metric.title} |" for metric in shown),
        lines=" ---: |" * len(shown),
        results="\n".join(rows),
        chosen=f"The weights are those of {best};\n{chosen}",
        probabilities=probabilities_section(model.decision),
        preprocessing=preprocessing_of(model).summary(),
        trained=probe if config.model.train_only == "probe" else steps,
    )


def plain_card(model: ImageClassifier) -> str:
    """Returns the card of a model that carries no history: what it is and how to use it."""
    config, names = model.config, model.class_names or []
    tag, architecture, paper = _architecture(model)
    header = [f"{key}: {json.dumps(value)}" for key, value in _kind(tag).items()]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    classes = (
        f"It distinguishes {len(names)} classes: {', '.join(names[:20])}{more}." if names else ""
    )
    height, width = config.image_size
    return f"""---
{chr(10).join([*header, "# license: not stated"])}
---

# {architecture}

{architecture}, {config.summary()}: {model.num_parameters:,} parameters, {flops_text(config.flops)}
per image. Input: {height}x{width} pixels, {preprocessing_of(model).summary()}.
{classes}

{_USE.format(place="In this folder", source=".")}
What it was trained on, its accuracy and its licence are not stated.

Architecture: {architecture}, {paper}.
"""


def published_card(card: str, name: str, changes: dict[str, Any]) -> str:
    """Returns the card of a folder as it is to be on the hub: the code loads it from there.

    `changes` are header fields to set, such as the licence.
    """
    use = _USE.format(place="From anywhere", source=f"{PREFIX}{name}")
    section = re.compile(r"## Use\n.*?```\nmixer [^\n]*\n```\n", re.DOTALL)
    card = section.sub(lambda _: use, card, count=1)
    for key, value in changes.items():
        line, field = f"{key}: {json.dumps(value)}", re.compile(rf"^(?:# )?{key}:.*$", re.MULTILINE)
        if old := field.search(card):
            card = f"{card[: old.start()]}{line}{card[old.end() :]}"
        elif card.startswith("---\n"):
            card = card.replace("---\n", f"---\n{line}\n", 1)
    return card


def _kind(tag: str) -> dict[str, Any]:
    """The fields by which the hub sorts models."""
    task = "image-classification"
    return {"library_name": "allmlp", "pipeline_tag": task, "tags": [task, tag]}


def _architecture(model: ImageClassifier) -> tuple[str, str, str]:
    """The hub's tag for the model family, the name of the architecture, and the paper."""
    config = model.config
    if isinstance(config, TimmConfig):
        return "timm", config.name, "as timm has it, whose documentation names the paper"
    family = family_of(config)
    name, paper = family.title, family.paper
    if variant := getattr(config, "variant", ""):
        name, paper = f"{name} variant", f"{paper}, changed as in its appendix A.1: {variant}"
    known = architecture_name(config)
    return family.title.lower().replace(" ", "-"), f"{name} {known}" if known else name, paper


def _base_model(weights: str) -> str | None:
    """The owner/name of weights on the hub."""
    if weights.startswith("timm:"):
        return f"timm/{weights.removeprefix('timm:')}"
    known = find_checkpoint(weights)
    return _on_hub(weights) if weights.startswith(PREFIX) else known and known.hub


def _on_hub(name: str) -> str:
    return name.removeprefix(PREFIX).partition("@")[0]
