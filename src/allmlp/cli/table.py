"""Commands built from option dataclasses: flags, help, and the call of the function."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from allmlp.cli.results import SHARED, Sourced, UsageError, as_flags, split_config
from allmlp.errors import UserError
from allmlp.options import Done, ImageSize, Repeated, documentation, validated

_WEIGHTS = "A run folder, a .safetensors, .npz or .pth file, a name of `mixer models --weights`, "
POSITIONAL = {
    "models": "Names of `mixer models` or timm:NAME, run folders, weights files, checkpoints.",
    "weights": f"{_WEIGHTS}or hf:owner/name.",
    "model": f"{_WEIGHTS}hf:owner/name, or an exported file.",
    "images": "Images, folders, or any source of data.",
    "repo": "owner/name on the hub; made if it does not exist.",
    "recipe": "A name of docs/recipes.md.",
    "runs": "Run folders, measurement files, and folders that are searched for them.",
    "output": "The file or folder to write.",
    "data": "A folder of class folders, a .csv or .jsonl list, Parquet, packed data, "
    "hf:owner/name, or digits.",
}
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Command:
    """A command: its options, function and help.

    `words` are the paths of the options dataclass, whose docstring is the help, and of the
    function; then the positional arguments: "recipe?" is optional, "images*" many, "models*?" both.
    If the function's module has a `show`, that is called with the result and the options, and
    returns the exit code or None; otherwise the function prints, and may return `Done`.
    """

    words: str
    summary: str

    def run(self, name: str, given: list[str]) -> tuple[int, Any]:
        """Runs the command; returns its exit code and result, `Sourced` if it takes a model."""
        import tyro

        kind_path, function_path, *positional = self.words.split()
        kind = getattr(*_found(kind_path))
        given, settings = split_config(given)
        own: dict[str, Any] = {}
        if "version" in settings:  # config.json of a run
            if "base" not in [field.name for field in dataclasses.fields(kind)]:
                what = "the settings of a run, and only train and finetune take them"
                raise UserError(what, where="config", fix="Write a file of this command's options")
            own["base"] = settings
        else:
            before, after = as_flags(kind, settings, given)
            given = [*before, *given, *after]
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                parsed = tyro.cli(
                    _arguments(kind, positional),
                    prog=f"mixer {name}",
                    description=f"{inspect.cleandoc(kind.__doc__ or '')}\n\n{SHARED}",
                    args=given,
                    config=(tyro.conf.FlagCreatePairsOff,),
                )
        except SystemExit as end:
            if not end.code:
                raise
            raise _wrong_number(errors.getvalue()) or UsageError(errors.getvalue()) from None
        values = vars(parsed) | own
        named = {word.rstrip("?*"): values.pop(word.rstrip("?*")) for word in positional}
        options = validated(kind, values)
        module, function = _found(function_path)
        result, code = getattr(module, function)(*named.values(), options), 0
        if hasattr(module, "show"):
            code = module.show(result, options) or 0
        elif isinstance(result, Done):
            code, result = result.code, result.values
        source = named.get("weights") or named.get("model")
        return code, result if source is None else Sourced(source, result)


def _wrong_number(printed: str) -> UserError | None:
    """Returns the error for an option that takes a number and got something else, which tyro
    explains by Python's types."""
    text = " ".join(re.sub("[╭╮╰╯─│]", " ", printed).split())
    kind = r"(?:no type matching \S*?\b(INT|FLOAT)\b\S* could be .*? from \['(.*?)'\]"
    kind += r"|invalid literal for (int)\(\) with base 10: '(.*?)')"
    found = re.search(rf"Error parsing (--[\w-]+): {kind}", text)
    if found is None:
        return None
    number = "a number" if found[2] == "FLOAT" else "a whole number"
    return UserError(f"{found[1]} takes {number}, got {found[3] or found[5]!r}", code="usage")


def _found(path: str) -> tuple[types.ModuleType, str]:
    """Imports the module of a path; "evaluate.command" is `command` in allmlp.evaluate."""
    module, _, name = path.rpartition(".")
    return importlib.import_module(f"allmlp.{module}"), name


def _arguments(kind: type, positional: Sequence[str]) -> type:
    """Returns a dataclass of all arguments, annotated for tyro."""
    from tyro.conf import Positional, arg

    fields: list[Any] = []
    for argument in positional:
        name = argument.rstrip("?*")
        plain: Any = tuple[str, ...] if "*" in argument else str
        default: Any = dataclasses.MISSING
        metavar = "MODEL" if name == "weights" else name.upper()
        if argument.endswith("*?"):
            default, metavar = (), f"[{metavar} ...]"
        elif argument.endswith("?"):
            plain, default, metavar = str | None, None, f"[{metavar}]"
        shown = arg(help=POSITIONAL[name], metavar=metavar, help_behavior_hint="")
        hint: Any = Annotated[Positional[plain], shown]
        fields.append((name, hint, dataclasses.field(default=default)))
    texts, hints = documentation(kind), typing.get_type_hints(kind)  # without ranges of numbers
    whole = typing.get_type_hints(kind, include_extras=True)
    hints |= {name: Repeated for name, hint in whole.items() if hint == Repeated}
    for field in dataclasses.fields(kind):
        if field.init and not field.metadata.get("hidden"):
            hint = _annotated(hints[field.name], field, texts.get(field.name, ""))
            given: Any = {"default": field.default, "default_factory": field.default_factory}
            fields.append((field.name, hint, dataclasses.field(**given)))
    return dataclasses.make_dataclass("Arguments", fields, kw_only=True)


def _annotated(hint: Any, field: dataclasses.Field[Any], text: str) -> Any:
    """Annotates an option's type for tyro with its help and metavar."""
    from tyro.conf import UseAppendAction, arg
    from tyro.constructors import PrimitiveConstructorSpec

    hint = field.metadata.get("type", hint)  # if Python accepts more, such as a model
    shown: dict[str, Any] = {"help": text}
    if field.default in (None, False, ()):
        shown["help_behavior_hint"] = ""
    if "flag" in field.metadata:
        shown["name"] = field.metadata["flag"]
    kinds = [part for part in _parts(hint) if part is not types.NoneType]
    if hint == Repeated:
        metavar = field.metadata.get("metavar", "TEXT")
        return Annotated[UseAppendAction[tuple[str, ...]], arg(**shown, metavar=metavar)]
    if set(kinds) == set(_parts(ImageSize)):
        size = PrimitiveConstructorSpec(
            1,
            "PIXELS|HxW",
            instance_from_str=_parsed_size,
            is_instance=lambda value: value is None or isinstance(value, int | tuple),
            str_from_instance=lambda v: ["x".join(map(str, v)) if isinstance(v, tuple) else str(v)],
        )
        return Annotated[hint, size, arg(**shown)]
    metavar = field.metadata.get("metavar")
    if metavar is None and Path in kinds:
        metavar = METAVARS[Path]
    elif metavar is None and len(kinds) == 1:
        choices = typing.get_args(kinds[0]) if typing.get_origin(kinds[0]) is Literal else ()
        metavar = "{" + ",".join(choices) + "}" if choices else METAVARS.get(kinds[0])
        if typing.get_origin(kinds[0]) is tuple:
            metavar = f"{METAVARS.get(typing.get_args(kinds[0])[0], 'VALUE')} ..."
    if metavar is not None:
        shown["metavar"] = metavar
    return Annotated[hint, arg(**shown)]


def _parts(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _parsed_size(words: list[str]) -> int | tuple[int, int]:
    parts = words[0].lower().split("x")
    is_number = [part.isdecimal() and len(part) < 7 and int(part) > 0 for part in parts]
    if not (1 <= len(parts) <= 2 and all(is_number)):
        example = "a number such as 224, or height x width such as 192x256"
        raise ValueError(f"not an image size: {words[0]!r}; it is {example}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
