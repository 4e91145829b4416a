"""`--quiet`, `--json` and `--config` of every command: what it prints, and options from a file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from allmlp.errors import UserError, one_of
from allmlp.names import NAME
from allmlp.options import ImageSize, Repeated

SHARED = """All commands also take --config FILE (options from a JSON file), --quiet (nothing but
errors), --json (the result as one JSON object) and --debug (the traceback of an error)."""


class UsageError(UserError):
    """Arguments that do not fit the command; `shown` is the message for a terminal."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        lines = (re.sub("[╭╮╰╯─│]", " ", line).strip() for line in shown.splitlines())
        super().__init__("; ".join(filter(None, lines)), code="usage")


class Sourced(NamedTuple):
    """The result of a command, and the model that it was given."""

    source: str
    result: Any


@contextlib.contextmanager
def streams(given: Sequence[str], *, quiet: bool, as_json: bool) -> Iterator[None]:
    """Sends what is printed inside the block to standard error, or nowhere if quiet.

    Results that an option sends to standard output, as in `--output -`, are no messages.
    """
    line = " ".join(given)
    writes = re.search(r"--(output|exclude)[ =]-( |$)", line) is not None
    if as_json and writes:
        what = "json and - both write to standard output"
        raise UserError(what, fix="Name a file, or leave out --json", code="conflict")
    with contextlib.ExitStack() as stack:
        if quiet:
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stderr(null))
        if as_json or (quiet and not writes):
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _plain(value: Any) -> Any:
    """Returns what JSON does not know as JSON values: by its own `to_json`, else its fields."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value.tolist() if hasattr(value, "tolist") else str(value)


def to_json(result: Any) -> Any:
    """Returns a result as JSON values; None for numbers that are not finite."""
    return json.loads(json.dumps(result, default=_plain), parse_constant=lambda _: None)


def print_json(result: Any) -> None:
    """Prints a result as one JSON object, with the version and the source of the model."""
    head = {NAME: version(NAME)}
    if isinstance(result, Sourced):
        head["source"], result = result
    values = to_json(result)
    values = values if isinstance(values, dict) else {"results": values or []}
    print(json.dumps({**head, **values}, indent=2), flush=True)


def split_config(given: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Returns the arguments without `--config FILE`, and the contents of the file."""
    rest, values, words = [], {}, iter(given)
    for word in words:
        name, equals, path = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        from allmlp.io import expand, read_json

        file = expand(path if equals else next(words, ""))
        if not file.is_file():
            what = f"no such file: {str(file)!r}"
            raise UserError(what, where="config", fix="Give a JSON file", code="missing-file")
        found = read_json(file, "not a JSON object")
        if not isinstance(found, dict):
            raise UserError("not a JSON object", where=file)
        values |= found
    return rest, values


def as_flags(
    kind: Any, values: dict[str, Any], given: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Returns options as flags: the repeatable ones, which come before those that were given, and
    the others without those."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    fields |= {f.metadata["flag"]: f for f in fields.values() if "flag" in f.metadata}
    typed = {word.partition("=")[0].replace("_", "-") for word in given}
    repeated: list[str] = []
    flags: list[str] = []
    for key, value in values.items():
        field = fields[one_of("option", key.replace("-", "_"), fields, where="config")]
        flag = f"--{field.metadata.get('flag', field.name).replace('_', '-')}"
        if hints[field.name] == Repeated:
            pairs = value.items() if isinstance(value, dict) else ()
            texts = [f"{name}={_text(inner)}" for name, inner in pairs] or value or ()
            repeated += [f"{flag}={text}" for text in texts]
        elif flag in typed or value is None or value is False:
            continue
        elif value is True:
            flags.append(flag)
        elif isinstance(value, list) and set(typing.get_args(ImageSize)) <= set(
            typing.get_args(hints[field.name])
        ):
            flags.append(f"{flag}={'x'.join(map(str, value))}")
        elif isinstance(value, list):
            flags += [flag, *map(_text, value)]
        else:
            flags.append(f"{flag}={_text(value)}")
    return repeated, flags


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
