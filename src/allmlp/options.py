"""Options: one frozen dataclass defines a command's flags, a function's keywords and the JSON."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from allmlp.errors import UserError, near_names, needs

Precision = Literal["auto", "float32", "bfloat16"]
ResizeWeights = Literal["auto", "block-diagonal", "resample"]
ImageSize = int | tuple[int, int]  # pixels: side, or (height, width); 192x256 on the command line
Repeated = Annotated[tuple[str, ...], "repeated"]  # the flag is repeated for each value


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of all options: unknown names and wrong types are errors."""

    __pydantic_config__ = {"extra": "forbid", "arbitrary_types_allowed": True}  # noqa: RUF012


@dataclass(frozen=True)
class Done:
    """What a command did, for `--json`, and its exit code."""

    values: dict[str, Any]
    code: int = 0


@dataclass(frozen=True, kw_only=True)
class SizeOptions(Options):
    """The image size of a model."""

    image_size: ImageSize | None = None
    """Image size in pixels; defaults to the model's own."""
    resize_weights: ResizeWeights = "auto"
    """How the token-mixing weights are resized to another image size."""

    def __post_init__(self) -> None:
        resizing = None if self.resize_weights == "auto" else self.resize_weights
        needs({"resize_weights": resizing}, "image_size", self.image_size)


@dataclass(frozen=True, kw_only=True)
class LoadOptions(SizeOptions):
    """How a model is loaded: its image size, and metadata that third-party weights lack."""

    class_names: str | Path | tuple[str, ...] | None = dataclasses.field(
        default=None, metadata={"type": str | None, "metavar": "FILE"}
    )
    """File of class names in the order of the logits, one per line or a JSON list; for weights that
    carry none."""
    mean: tuple[float, ...] | None = None
    """Mean of the pixels on [0, 1], one number or one per channel, such as 0.485 0.456 0.406."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the pixels on [0, 1], likewise."""

    @property
    def loading(self) -> dict[str, Any]:
        """The keywords of `load_model` that are set."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(LoadOptions)}
        return {name: v for name, v in given.items() if v not in (None, "auto")}


Kind = TypeVar("Kind")


class OptionError(UserError):
    """An unknown option or an invalid value."""

    def __init__(self, name: str, what: str, fix: str | None, code: str) -> None:
        super().__init__(what, fix=fix, code=code)
        self.name = name


def make(kind: type[Kind], options: Any, fields: dict[str, Any], first: str = "") -> Kind:
    """Returns the options updated by the keywords; the defaults without either. With `first`,
    `options` may also be the value of this field."""
    values = {}
    if first and isinstance(options, str | Path):
        fields, options = {**fields, first: str(options)}, None
    if options is not None:
        if not isinstance(options, kind):
            raise UserError(f"options must be {kind.__name__}, got {type(options).__name__}")
        names = [field.name for field in dataclasses.fields(cast(Any, kind))]
        values = {name: getattr(options, name) for name in names}
    return validated(kind, {**values, **fields})


def validated(kind: type[Kind], values: Any) -> Kind:
    """Builds the dataclass from keyword arguments or JSON, validated by pydantic."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        inner = found[0].get("ctx", {}).get("error")
        if isinstance(inner, UserError):
            raise inner from None
        raise _option_error(kind, values, found) from None


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


_CODES = {
    **dict.fromkeys(("unexpected_keyword_argument", "extra_forbidden"), "unknown-name"),
    **dict.fromkeys(("literal_error", "union_tag_invalid"), "unknown-name"),
    **dict.fromkeys(("greater_than", "greater_than_equal"), "out-of-range"),
    **dict.fromkeys(("less_than", "less_than_equal"), "out-of-range"),
    **dict.fromkeys(("missing", "missing_argument", "missing_keyword_only_argument"), "missing"),
}


def _option_error(kind: type, values: Any, errors: list[Any]) -> OptionError:
    first, path, inner = errors[0], [], values
    code = _CODES.get(first["type"], "wrong-type")
    if code == "missing":
        name = str(first["loc"][-1])
        return OptionError(name, f"{name} is required", None, code)
    for part in first["loc"]:  # includes the names of union members
        if isinstance(inner, dict) and part in inner:
            path, inner = [*path, part], inner[part]
    name = ".".join(map(str, path))
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [field.name for field in dataclasses.fields(kind)]
        fix = f"{near_names(name, known)}Known: {', '.join(known)}"
        return OptionError(name, f"unknown option {name!r}", fix, code)
    rules = dict.fromkeys(error["msg"] for error in errors)  # a union has one per member
    rule = " or ".join(text.removeprefix("Input should be ") for text in rules)
    rule = rule.replace("greater than or equal to", "at least")
    rule = rule.replace("less than or equal to", "at most")
    what = f"{name or 'the value'} must be {rule}, got {repr(first['input'])[:100]}"
    return OptionError(name, what, None, code)


def given_settings(options: Any, settings: Mapping[str, str]) -> dict[str, Any]:
    """Returns {setting: value} of the options that are not None; `settings` maps both names."""
    given = {key: getattr(options, name) for name, key in settings.items()}
    return {key: value for key, value in given.items() if value is not None}


def literal(text: str) -> Any:
    """Parses a Python literal or JSON's `null` and `true`; anything else is text."""
    words = {"null": None, "none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def assigned(texts: Iterable[str], where: str = "set") -> dict[str, str]:
    """Returns {"width": "40"} for ["width=40"]."""
    found = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            what = f"a setting is written KEY=VALUE, got {text!r}"
            raise UserError(what, where=where, fix="for example num_blocks=4")
        found[key] = value
    return found


def assignments(texts: Iterable[str], where: str = "set") -> dict[str, Any]:
    """Returns {"width": 40} for ["width=40"]."""
    return {key: literal(value) for key, value in assigned(texts, where).items()}


@functools.cache  # parsing takes milliseconds, and every flag asks
def _definitions(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def documentation(kind: type) -> dict[str, str]:
    """Returns the docstring under each field of a dataclass and its bases, or its metadata's."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        known = _definitions(base.__module__) if dataclasses.is_dataclass(base) else {}
        body = known[base.__name__].body if base.__name__ in known else []
        for node, text in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(node.target)] = inspect.cleandoc(ast.literal_eval(text.value))
    found |= {f.name: f.metadata["doc"] for f in dataclasses.fields(kind) if "doc" in f.metadata}
    return {name: text.replace("\n", " ") for name, text in found.items()}
