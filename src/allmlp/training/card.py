"""What a run has come to, and the model card (best/README.md) that says so."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

from allmlp.data.source import Source
from allmlp.data.source_spec import parse_name
from allmlp.data.sources.hub import PREFIX
from allmlp.decision import Decision
from allmlp.errors import some_of
from allmlp.evaluation.calibration import summary
from allmlp.evaluation.metrics import METRICS, Evaluation
from allmlp.models.catalog import architecture_name, family_of
from allmlp.models.layers import Classifier, flops_text, preprocessing_of
from allmlp.models.timm_model import TimmConfig
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Splits
from allmlp.weights.checkpoints import find_checkpoint

_TASK = "image-classification"
_HUB_METRICS = {
    "mean_average_precision": "mean_average_precision",
    "top1": "accuracy",
    "balanced_accuracy": "balanced_accuracy",
    "macro_f1": "f1",
}
# Of the weights it began with -> as the hub names it.
_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}
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
_CARD = """---
{header}
---

# {title}

{architecture}, {described}.
{classes}

{measured}{use}
Images of any size and mode are turned upright and preprocessed as the model requires:
{preprocessing}.

{history}

Architecture: {architecture}, {paper}.

{licence}
"""
_MEASURED = """## Accuracy

| images | split |{titles}
| ---: | --- |{lines}
{rows}

The weights are those of {chosen}. {caveat}

{probabilities}"""
_HISTORY = """## Training

{trained}
Every setting is in the run's `config.json`.

## Limits

It was trained only on the images named above: for images of another kind, from another camera or
of other classes its answers and probabilities mean nothing."""
_LICENCE = """Licence: the code that made it, allmlp, is Apache-2.0. That of these weights is the
choice of whoever trained them, and depends on the images{begun}."""

PROBABILITIES = "## Probabilities"


@dataclass(frozen=True)
class Outcome:
    """The facts of a run, from which console, card and page are written."""

    config: TrainConfig
    splits: Splits
    model: Classifier
    validation: Evaluation | None = None
    test: Evaluation | None = None

    @property
    def shown(self) -> Evaluation | None:
        return self.validation if self.test is None else self.test

    @property
    def source(self) -> Source | None:
        return self.splits.validation if self.test is None else self.splits.test

    @property
    def caveat(self) -> str:
        if self.splits.test is not None:
            return "The test images are measured once, at the end."
        if self.splits.validation is None:
            return "All images were trained on, none are left to measure the accuracy."
        if self.config.data.fold is not None:
            return "The held-out fold is measured once, at the end."
        return (
            "There are no test images: the weights were chosen by these validation images, so "
            "expect somewhat less on new ones."
        )


def described(model: Classifier) -> str:
    height, width = model.config.image_size
    cost = f"{model.num_parameters:,} parameters, {flops_text(model.config.flops)} per image"
    return f"{model.config.summary()}, {height}x{width} pixels: {cost}"


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


def model_card(outcome: Outcome) -> str:
    """Returns the model card, with the header that hubs read and without local paths."""
    config, model, num_images = outcome.config, outcome.model, len(outcome.splits.train)
    data, weights, optimizer = config.data.source, config.model.weights or "", config.optimizer
    base, known = parse_name(data).base, find_checkpoint(weights) if weights else None
    name, start, begun = weights, "", ""
    if not weights.startswith((PREFIX, "timm:")):  # only the last part of a path
        name = os.path.basename(os.path.normpath(weights).removesuffix(f"{os.sep}best"))
    if weights:
        licence = "" if known is None else f" ({known.licence})"
        start = f"from the weights {name}; "
        begun = f" and on the weights that it began with, {name}{licence}"
    header: dict[str, Any] = {
        "license": known and _LICENCES.get(known.licence, "other"),
        "datasets": [_on_hub(base)] if base.startswith(PREFIX) else None,
        "base_model": known and known.hub,
    }
    if weights.startswith((PREFIX, "timm:")):
        header["base_model"] = _on_hub(weights).replace("timm:", "timm/")
    rows, results = [], []
    measured = [found for found in (outcome.validation, outcome.test) if found is not None]
    figures = [dict(found.figures()) for found in measured]
    shown = [m for m in METRICS if figures and all(m.name in values for values in figures)]
    for found, values in zip(measured, figures, strict=True):
        split = public_name(data, found.data)
        cells = " | ".join(f"{values[m.name]:{m.format}}" for m in shown)
        rows.append(f"| {len(found.labels):,} | {split} | {cells} |")
        metrics = [
            {"type": _HUB_METRICS[m.name], "name": m.title, "value": round(values[m.name], 6)}
            for m in shown
            if m.name in _HUB_METRICS
        ]
        dataset = {"name": split, "type": public_name(data, base)}
        results.append({"task": {"type": _TASK}, "dataset": dataset, "metrics": metrics})
    title = f"{_architecture(model)[1]} on {public_name(data, data)}"
    if results:
        header["metrics"] = [results[0]["metrics"][0]["type"]]
        header["model-index"] = [{"name": title, "results": results}]
    keeps_last = outcome.splits.validation is None or config.data.fold is not None
    by = "accuracy" if config.best_by == "top1" else config.best_by.replace("_", " ")
    trained = (
        f"Recipe `{config.recipe}`, seed {config.seed}: {config.length} of {num_images:,} images "
        f"in batches of {config.batch_size}; {start}{optimizer.name}, learning rate "
        f"{optimizer.learning_rate:g}, weight decay {getattr(optimizer, 'weight_decay', 0.0):g}."
    )
    if config.model.train_only == "probe":
        trained = f"A linear probe: the head alone was fitted to the features that {name} "
        trained += f"gives of {num_images:,} images, without augmentation."
    accuracy = _MEASURED.format(
        titles="".join(f" {metric.title} |" for metric in shown),
        lines=" ---: |" * len(shown),
        rows="\n".join(rows),
        chosen="the last step" if keeps_last else f"the best validation {by}",
        caveat=outcome.caveat,
        probabilities=probabilities_section(model.decision),
    )
    place = 'In this folder ("."; elsewhere give its path)'
    texts = accuracy, _HISTORY.format(trained=trained), _LICENCE.format(begun=begun)
    return _card(model, title, header, place, texts)


def plain_card(model: Classifier) -> str:
    """Returns the card of a model that carries no history: what it is and how to use it."""
    history = "What it was trained on, its accuracy and its licence are not stated."
    return _card(model, _architecture(model)[1], {}, "In this folder", ("", history, ""))


def _card(
    model: Classifier, title: str, header: dict[str, Any], place: str, texts: tuple[str, str, str]
) -> str:
    tag, architecture, paper = _architecture(model)
    names = model.class_names or []
    kind = {"library_name": "allmlp", "pipeline_tag": _TASK, "tags": [_TASK, tag]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in (kind | header).items() if value]
    if not header.get("license"):
        lines.append("# license: not stated; see the end of this page")
    classes = f"It distinguishes {len(names)} classes: {some_of(names, 20)}."
    measured, history, licence = texts
    return _CARD.format(
        header="\n".join(lines),
        title=title,
        architecture=architecture,
        described=described(model),
        classes=classes if names else "",
        measured=measured,
        use=_USE.format(place=place, source="."),
        preprocessing=preprocessing_of(model).summary(),
        history=history,
        paper=paper,
        licence=licence,
    )


def published_card(card: str, name: str, changes: dict[str, Any]) -> str:
    """Returns a card whose code loads the model from the hub, with header fields changed."""
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


def _architecture(model: Classifier) -> tuple[str, str, str]:
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


def _on_hub(name: str) -> str:
    return name.removeprefix(PREFIX).partition("@")[0]
