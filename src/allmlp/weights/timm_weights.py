"""timm's published weights, read like all others; timm then loads them into its own model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from allmlp.console import Reporter
from allmlp.errors import UserError
from allmlp.models.family import Size
from allmlp.models.timm_model import (
    HAND_BUILT,
    PREFIX,
    TimmConfig,
    TimmModel,
    first_line,
    import_timm,
    known_to_timm,
)
from allmlp.weights import download
from allmlp.weights.checkpoints import imagenet_classes
from allmlp.weights.description import timm_preprocessing
from allmlp.weights.files import read_weights


def load_pretrained(source: str, report: Reporter) -> TimmModel:
    """Returns a model with timm's weights, class names and preprocessing, at its own size."""
    name = source.removeprefix(PREFIX)
    base = name.partition(".")[0]
    timm = import_timm()
    if base in HAND_BUILT:
        what = f"nobody has published weights of {PREFIX}{base}"
        raise UserError(what, fix=f'create_model("{PREFIX}{base}") draws new ones')
    described = known_to_timm(name)
    name = f"{base}.{described.tag}" if described.tag else base
    file = read_weights(_fetched(name, described, report))
    overlay = {"state_dict": dict(file.tensors), "custom_load": False}
    try:
        theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # timm's loaders can raise anything
        lines = (str(error) or type(error).__name__).strip().splitlines()
        what = f"timm cannot load {name}: {' '.join(lines[:2])[:300]}"
        raise UserError(what, where=file.path) from error
    file.tensors.clear()
    size = tuple(described.input_size[1:])
    model = from_timm(theirs, base, size)
    classes = model.config.num_classes
    if described.label_names and len(described.label_names) == classes:
        model.class_names = [str(label) for label in described.label_names]
    elif classes == 1000:
        model.class_names = imagenet_classes()
    where = f"{PREFIX}{name}"
    found = timm_preprocessing(asdict(described), size, model.config.in_channels, where)
    if found is not None:
        model.preprocessing, notes = found
        for note in notes:
            report.say(f"note     {name}: {note}")
    return model


def from_timm(theirs: Any, name: str, image_size: Size) -> TimmModel:
    """Wraps a timm model, whose weights are shared, with its classifier as our head."""
    theirs = theirs.float().eval()
    classifier: Any = theirs.get_classifier()
    window = getattr(classifier, "kernel_size", (1, 1))
    is_dense = isinstance(classifier, nn.Linear | nn.Conv2d) and window == (1, 1)
    prefix = next((key for key, module in theirs.named_modules() if module is classifier), None)
    tensors: dict[str, Tensor] = {
        f"backbone.{key}": value
        for key, value in theirs.state_dict().items()
        if not is_dense or not key.startswith(f"{prefix}.")
    }
    classes = 0
    if is_dense:
        classes, bias = len(classifier.weight), classifier.bias
        tensors["head.weight"] = classifier.weight.detach().flatten(1)
        tensors["head.bias"] = torch.zeros(classes) if bias is None else bias.detach()
    with torch.device("meta"):
        model = TimmModel(TimmConfig(name=name, image_size=image_size, num_classes=classes))
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        what = f"timm's {name} has other tensors with its classifier than without"
        raise UserError(f"{what}: {first_line(error)}") from error
    if not _has_same_head(theirs, model.eval()):
        what = f"timm's {name} computes more behind its features than one dense layer"
        raise UserError(what, fix="Its architecture can be trained from scratch: create_model")
    return model


@torch.no_grad()
def _has_same_head(theirs: Any, model: TimmModel) -> bool:
    """Whether our head maps random features to the same logits as timm's."""
    shape, backbone = model.config.measured.unpooled, cast(Any, model.backbone)
    if shape is None:
        return False
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = backbone.forward_head(drawn, pre_logits=True).flatten(1)
    ours = ours if model.head is None else model.head(ours)
    expected = theirs.forward_head(drawn).flatten(1)
    return ours.shape == expected.shape and torch.allclose(ours, expected, 1e-4, 1e-4)


def _fetched(name: str, described: Any, report: Reporter) -> Path:
    """Returns the path of timm's weights in the hub's cache or ours, downloaded if necessary."""
    if described.hf_hub_id and not described.hf_hub_filename:
        report.say(f"weights  {PREFIX}{name} (hf:{described.hf_hub_id})")
        found = download.parse_hub_name(f"{download.HUB_PREFIX}{described.hf_hub_id}")
        return download.fetch_from_hub(*found)
    if described.url and not described.custom_load:
        path = download.cache_folder() / "timm" / name / described.url.rpartition("/")[2]
        published = download.Published(name=f"{PREFIX}{name}", url=described.url)
        return download.cached(published, path, report)
    if described.url or described.hf_hub_id:
        where = described.url or f"{described.hf_hub_id}, {described.hf_hub_filename}"
        what = f"the weights of {PREFIX}{name} are in an unsupported format"
        raise UserError(what, where=where, fix="Take another tag")
    tags = import_timm().list_models(f"{name.partition('.')[0]}.*", pretrained=True)
    fix = f'create_model("{PREFIX}{name}") draws new ones'
    if tags:
        fix = f"Available: {', '.join(PREFIX + tag for tag in tags)}"
    raise UserError(f"timm has no weights of {PREFIX}{name}", fix=fix)
