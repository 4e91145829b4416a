"""Options that set fields of `TrainConfig`, with the types and the help of those fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from allmlp.options import Options, Repeated, documentation
from allmlp.training.config import AdamW, DataSettings, ModelSettings, TrainConfig

_SECTIONS = {"": TrainConfig, "model": ModelSettings, "data": DataSettings, "optimizer": AdamW}
_HINTS = {section: get_type_hints(kind) for section, kind in _SECTIONS.items()}
_DOCS = {section: documentation(kind) for section, kind in _SECTIONS.items()}


def flag(name: str, hint: Any, default: Any, doc: str, **metadata: str) -> tuple[str, Any, Any]:
    return name, hint, dataclasses.field(default=default, metadata={"doc": doc, **metadata})


_OTHER = "Any other setting, as config.json of a run names it; may be given many times."
OTHER_SETTINGS = flag("settings", Repeated, (), _OTHER, flag="set", metavar="KEY=VALUE")


def by_last_part(*settings: str) -> dict[str, str]:
    """Returns {option: setting}, such as "holdout" for "data.holdout"."""
    return {setting.rpartition(".")[2]: setting for setting in settings}


def setting_options(name: str, settings: Mapping[str, str], *more: tuple[str, Any, Any]) -> Any:
    """Returns a dataclass of options from {option: setting}, None by default, and `more` fields."""
    fields = []
    for option, key in settings.items():
        section, _, field = key.rpartition(".")
        fields.append(flag(option, _HINTS[section][field] | None, None, _DOCS[section][field]))
    fields += more
    return dataclasses.make_dataclass(name, fields, bases=(Options,), kw_only=True, frozen=True)
