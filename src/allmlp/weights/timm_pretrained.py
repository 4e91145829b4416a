"""timm's published weights: "timm:NAME" and "timm:NAME.TAG" -> a model in our frame.

The files are fetched and read as all others here, so that nothing that is loaded runs code; timm
itself then brings the tensors into its own model, whose classifier becomes our head.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allmlp.console import Reporter
from allmlp.errors import UserError
from allmlp.models.comparison_systems import HAND_BUILT
from allmlp.models.timm_model import (
    PREFIX,
    TimmConfig,
    TimmModel,
    build_backbone,
    import_timm,
    known_to_timm,
)
from allmlp.weights import hub
from allmlp.weights.checkpoints import CHECKPOINTS
from allmlp.weights.download import Published, cache_folder, cached
from allmlp.weights.files import read_weights
from allmlp.weights.timm import preprocessing_of


def load_pretrained(source: str, report: Reporter) -> TimmModel:
    """Returns a model with timm's weights, class names and preprocessing, at its own image size.

    Args:
        source: "timm:NAME" for timm's own choice of weights, or "timm:NAME.TAG".
        report: says what is fetched and what is assumed.

    Raises:
        UserError: timm is absent, has no such model or weights, the file cannot be had or is
            another one, or the classifier is not one dense layer.
    """
    name = source.removeprefix(PREFIX)
    base = name.partition(".")[0]
    if base in HAND_BUILT:
        what = f"nobody has published weights of {PREFIX}{base}"
        raise UserError(what, fix=f'create_model("{PREFIX}{base}") draws new ones')
    said = known_to_timm(name)
    name = f"{base}.{said.tag}" if said.tag else base
    if isinstance(said.classifier, tuple | list):
        what = f"{name} has {len(said.classifier)} classifiers, one is meant"
        raise UserError(what, fix="Take the model of that family without distillation")
    file = read_weights(_fetched(name, said, report))
    overlay = {"state_dict": dict(file.tensors), "custom_load": False}
    try:
        theirs = import_timm().create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # whatever timm's many loaders raise
        first = (str(error) or type(error).__name__).strip().splitlines()
        what = f"timm cannot load {name}: {' '.join(first[:2])[:300]}"
        raise UserError(what, where=file.path) from error
    file.tensors.clear()
    model = from_timm(theirs, base, (said.input_size[1], said.input_size[2]))
    model.class_names = _class_names(said, model.config.num_classes)
    described = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(said).items()
    }
    try:
        model.preprocessing, notes = preprocessing_of(
            described, model.config.image_size, model.config.in_channels
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} has a preprocessing that is not offered here: {error}") from error
    for note in notes:
        report.say(f"note     {name}: {note}")
    return model.eval()


def from_timm(theirs: Any, name: str, image_size: tuple[int, int]) -> TimmModel:
    """Returns a model of timm in our frame, its classifier as our head; the weights are shared.

    Args:
        theirs: timm's model, with its classifier or without one.
        name: of its architecture.
        image_size: (H, W) that it was built for.

    Raises:
        UserError: the classifier is not one dense layer, or does not come right behind what timm
            calls pre-logits.
    """
    theirs = theirs.float().eval()
    classifier = theirs.get_classifier()
    is_dense = isinstance(classifier, nn.Linear)
    is_dense |= isinstance(classifier, nn.Conv2d) and tuple(classifier.kernel_size) == (1, 1)
    if not is_dense and not isinstance(classifier, nn.Identity):
        what = f"the classifier of timm's {name} is a {type(classifier).__name__}"
        raise UserError(what, fix="Models whose classifier is one dense layer can be used")
    tensors: dict[str, Tensor] = {}
    prefix = next((key for key, each in theirs.named_modules() if each is classifier), None)
    for key, value in theirs.state_dict().items():
        if not is_dense or not key.startswith(f"{prefix}."):
            tensors[f"backbone.{key}"] = value
    classes = 0
    if isinstance(classifier, nn.Linear | nn.Conv2d):
        classes = classifier.weight.shape[0]
        bias = classifier.bias
        tensors["head.weight"] = classifier.weight.detach().flatten(1)
        tensors["head.bias"] = torch.zeros(classes) if bias is None else bias.detach()
    config = TimmConfig(name=name, image_size=image_size, num_classes=classes)
    with torch.device("meta"):
        model = TimmModel(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        what = f"timm's {name} has other tensors with its classifier than without"
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}") from error
    model.eval()
    _check_head(theirs, model)
    return model


@torch.no_grad()
def _check_head(theirs: Any, model: TimmModel) -> None:
    """Raises UserError unless our head makes of timm's features what timm makes of them."""
    config = dataclasses.replace(model.config, num_classes=0)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        bare: Any = build_backbone(config).to("meta").eval()
        features = bare.forward_features(torch.empty(1, config.in_channels, *config.image_size))
    same = isinstance(features, Tensor)
    if same:
        random = torch.Generator().manual_seed(0)
        drawn = torch.randn(features.shape, generator=random)
        backbone: Any = model.backbone
        ours = backbone.forward_head(drawn, pre_logits=True).flatten(1)
        ours = ours if model.head is None else model.head(ours)
        expected = theirs.forward_head(drawn).flatten(1)
        same = ours.shape == expected.shape and torch.allclose(ours, expected, 1e-4, 1e-4)
    if not same:
        what = f"timm's {config.name} computes more behind its features than one dense layer"
        raise UserError(what, fix="Its architecture can be trained anew: create_model")


def _fetched(name: str, said: Any, report: Reporter) -> Path:
    """Returns the file of timm's weights, from the hub's cache or our own, downloaded if need be.

    Raises:
        UserError: there is none, it is of a form that is not read here, or it cannot be had.
    """
    if said.hf_hub_id and not said.hf_hub_filename:
        report.say(f"weights  {PREFIX}{name} (hf:{said.hf_hub_id})")
        return hub.fetch(hub.parse(f"{hub.PREFIX}{said.hf_hub_id}"))
    if said.url and not said.custom_load:
        path = cache_folder() / "timm" / name / said.url.rpartition("/")[2]
        return cached(Published(f"{PREFIX}{name}", said.url), path, report)
    if said.url or said.hf_hub_id:
        where = said.url or f"{said.hf_hub_id}, {said.hf_hub_filename}"
        what = f"the weights of {PREFIX}{name} are in a form of their own, which is not read here"
        raise UserError(what, where=where, fix="Take another tag")
    tags = import_timm().list_models(f"{name.partition('.')[0]}.*", pretrained=True)
    what = f"there are no weights of {PREFIX}{name}"
    fix = f"There are: {', '.join(PREFIX + each for each in tags)}" if tags else None
    raise UserError(what, fix=fix or f'create_model("{PREFIX}{name}") draws new ones')


def _class_names(said: Any, num_classes: int) -> list[str] | None:
    """Returns the names that timm brings, or ImageNet's where there are 1000 classes."""
    if said.label_names and len(said.label_names) == num_classes:
        return [str(each) for each in said.label_names]
    return CHECKPOINTS["mixer_b16.i1k"].class_names() if num_classes == 1000 else None
