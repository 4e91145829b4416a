"""Text and JSON values -> checked dataclasses; a mistake names the key and the nearest one."""

from __future__ import annotations

import ast
import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from allmlp.errors import UserError, near_names

Section = TypeVar("Section")


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raises UserError with the key, the rule and the value where the condition does not hold."""
    if not condition:
        raise UserError(f"{key} must be {rule}, got {value!r}")


# What other programs call a setting -> ours.
_ELSEWHERE = {
    **dict.fromkeys(
        ("ema", "ema_decay", "model_ema", "model_ema_decay"),
        "optimizer.average, such as --set optimizer.average=0.9",
    ),
    **dict.fromkeys(("lr", "lr0", "base_lr"), "optimizer.learning_rate, or --learning-rate"),
    "wd": "optimizer.weight_decay",
    "grad_clip": "optimizer.clip_norm",
    "drop_path": "model.overrides.stochastic_depth",
    "drop_rate": "model.overrides.dropout",
    **dict.fromkeys(
        ("class_weights", "class_weight", "cls_pw"),
        "none: every image counts alike. What each class reaches is told by `mixer evaluate`",
    ),
}


def refuse_key(key: str, known: dict[str, Any]) -> typing.NoReturn:
    """Raises UserError for an unknown key, with ours where another name is meant, or near ones."""
    name = key.rpartition(".")[2]
    if name in _ELSEWHERE:
        raise UserError(f"unknown setting {key!r}", fix=f"Here that is {_ELSEWHERE[name]}")
    inside = {section: values for section, values in known.items() if isinstance(values, dict)}
    names = [*known, *(f"{section}.{each}" for section in inside for each in inside[section])]
    fix = f"{near_names(name, names)}Known here: {', '.join(known)}"
    raise UserError(f"unknown setting {key!r}", fix=fix)


def literal(text: str) -> Any:
    """A Python literal (numbers, booleans, tuples), `null` and `true` as JSON has them, or text."""
    named = {"null": None, "none": None, "true": True, "false": False}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def build(kind: type[Section], values: Any, path: str = "") -> Section:
    """Returns the dataclass of such JSON values; what is absent takes its default.

    Raises:
        UserError: an unknown key or a value of the wrong type, with the key's path.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path or 'the configuration'} must be an object, got {values!r}")
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            refuse_key(f"{path}{key}", hints)
        arguments[key] = _convert(hints[key], value, f"{path}{key}")
    return kind(**arguments)


def fits(kind: type, key: str, value: Any) -> bool:
    """Returns whether a value has the type of the field that a path "section.name" leads to."""
    hint: Any = kind
    for name in key.split("."):
        if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
            return True  # inside a dict, whose values have no declared type
        hints = get_type_hints(hint)
        if name not in hints:
            return True  # the key itself is refused elsewhere
        hint = hints[name]
    try:
        _convert(hint, value, key)
    except UserError:
        return False
    return True


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return build(hint, value, f"{key}.")
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in options:
            names = [str(option) for option in options]
            near = near_names(str(value), names)
            raise UserError(
                f"{key} must be one of {names}, got {value!r}", fix=near.strip() or None
            )
        return value
    if origin in (types.UnionType, typing.Union):
        for option in options:
            try:
                return _convert(option, value, key)
            except UserError:
                continue
    elif origin is tuple:
        if isinstance(value, list | tuple) and options[1:] == (...,):
            return tuple(_convert(options[0], each, key) for each in value)
        if isinstance(value, list | tuple) and len(value) == len(options):
            return tuple(_convert(o, v, key) for o, v in zip(options, value, strict=True))
    elif origin is dict:
        if isinstance(value, dict):
            return value
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            require(math.isfinite(value), key, value, "a finite number")
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    kind = hint.__name__ if isinstance(hint, type) else str(hint)
    raise UserError(f"{key} must be a value of type {kind}, got {value!r}")
