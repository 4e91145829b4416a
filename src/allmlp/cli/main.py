"""Entry of the `mixer` command: finds the verb, and turns every error into one message.

Exit codes: 0 done; 1 a bug of ours, with its traceback; 2 a mistake of the user's; 3 done, but some
images were bad; 130 stopped with Ctrl-C, 143 with SIGTERM. No torch is imported before a verb runs.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from allmlp.cli.table import Command
from allmlp.cli.verbs import GROUPS, VERBS
from allmlp.errors import UserError, fix_of, named_memory_errors, near_names
from allmlp.runtime.process import (
    is_main_process,
    keep_freed_memory,
    open_standard_streams,
    refuse_removed_folder,
)

DESCRIPTION = """MLP-Mixer in PyTorch: train, evaluate and use all-MLP image classifiers.

Begin with `mixer train`: without arguments it trains a small Mixer on real digits, in one or two
minutes. `mixer COMMAND --help` has examples. `--debug` shows the traceback of an error."""


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """The bytes of a file name as they are; what is no part of a name, written out."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error("allmlp.escape", _escape)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb and ends the process with its exit code.

    Args:
        arguments: as typed after `mixer`; None takes the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be valid text
            stream.reconfigure(errors="allmlp.escape")
    keep_freed_memory()
    try:
        refuse_removed_folder()
        with named_memory_errors():
            sys.exit(parse(given, VERBS) or 0)
    except UserError as error:
        if debug:
            traceback.print_exc()
        elif is_main_process() or error.what.startswith("rank "):
            print(f"error: {error.text()}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a folder without permission
        if error.errno is None or error.strerror is None:
            raise
        if debug:
            traceback.print_exc()
        else:
            shown = UserError(error.strerror, where=error.filename, fix=fix_of(error))
            print(f"error: {shown.text()}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def parse(arguments: Sequence[str], verbs: dict[str, Any]) -> Any:
    """Parses the arguments, calls the verb that they name and returns what it returns.

    Raises:
        UserError: there is no such verb. (Wrong flags end the process with exit code 2.)
    """
    given = list(arguments) or ["--help"]
    if given[0] == "--version":
        from importlib.metadata import version

        print(f"allmlp {version('allmlp')}")
        return 0
    groups = _groups(verbs)
    if given[0] in groups:  # "data check" and its like: two words
        name, given = given[0], given[1:] or ["--help"]
        return _choose(given, groups[name], f"mixer {name}", GROUPS[name])
    single = {name: verb for name, verb in verbs.items() if " " not in name}
    single |= dict.fromkeys(groups, None)
    return _choose(given, single, "mixer", DESCRIPTION)


def _choose(given: list[str], verbs: dict[str, Any], prog: str, description: str) -> Any:
    """Parses the arguments of the command that the first of them names, and runs it."""
    name = given[0]
    if name in ("-h", "--help"):
        print(_help(verbs, prog, description))
        return 0
    if name not in verbs:
        flag = f"--{name}"
        near = near_names(name, verbs)
        near = f"Did you mean mixer {flag}? " if flag in ("--version", "--help") else near
        fix = f"{near}Known: {', '.join(verbs)}"
        where = None if prog == "mixer" else prog
        raise UserError(f"unknown command {name!r}", where=where, fix=fix, code="unknown-name")
    command = verbs[name]
    if isinstance(command, Command):
        return command.run(f"{prog} {name}".removeprefix("mixer "), given[1:])
    import tyro

    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(command, prog=f"{prog} {name}", args=given[1:], config=config)


def _help(verbs: dict[str, Any], prog: str, description: str) -> str:
    """The help of a group of commands: a line for each."""
    width = max(map(len, verbs))
    lines = [f"usage: {prog} COMMAND [OPTIONS]", "", description, "", "commands:"]
    for name, command in verbs.items():
        if command is None:
            summary = GROUPS[name]
        elif isinstance(command, Command):
            summary = command.summary
        else:
            summary = (command.__doc__ or "").partition("\n")[0]
        lines += [f"  {name:{width}}  {summary}"]
    return "\n".join(lines)


def _groups(verbs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The verbs of two words, by the first of them."""
    groups: dict[str, dict[str, Any]] = {}
    for name, verb in verbs.items():
        first, _, second = name.partition(" ")
        if second:
            groups.setdefault(first, {})[second] = verb
    return groups
