"""Entry point of `mixer`: dispatches to a command and turns every user error into one message.

Exit codes: 0 success; 1 a bug, with a traceback; 2 a user error; 3 success, but with bad images;
130 stopped by Ctrl-C, 143 by SIGTERM. torch is not imported before a command runs.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from allmlp.cli.results import SHARED, UsageError, print_json, streams
from allmlp.cli.verbs import GROUPS, VERBS
from allmlp.errors import UserError, fix_of, named_memory_errors, one_of
from allmlp.runtime.process import (
    is_main_process,
    keep_freed_memory,
    open_standard_streams,
    refuse_removed_folder,
)

DESCRIPTION = f"""MLP-Mixer in PyTorch: train, evaluate and use all-MLP image classifiers.

Begin with `mixer train`: without arguments it trains a small Mixer on real digits, in one or two
minutes. `mixer COMMAND --help` has examples. {SHARED}"""


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encoding error handler: raw bytes of file names; backslash escapes for other text."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error("allmlp.escape", _escape)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the arguments name, or sys.argv; exits with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, quiet, as_json = (word in given for word in ("--debug", "--quiet", "--json"))
    given = [word for word in given if word not in ("--debug", "--quiet", "--json")]
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be valid text
            stream.reconfigure(errors="allmlp.escape")
    keep_freed_memory()
    try:
        refuse_removed_folder()
        with named_memory_errors(), streams(given, quiet=quiet, as_json=as_json):
            code, result = parse(given)
        if as_json and is_main_process():
            print_json(result)
        sys.exit(code)
    except BrokenPipeError:  # the reader has exited, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:  # OSError: a full disk, a folder without permission
        shown = error
        if isinstance(error, OSError):
            if error.errno is None or error.strerror is None:
                raise
            fix = fix_of(error)
            shown = UserError(error.strerror, where=error.filename, fix=fix, code="system")
        if debug:
            traceback.print_exc()
        elif isinstance(error, UsageError):
            print(error.shown, file=sys.stderr, end="", flush=True)
        elif isinstance(error, OSError) or (
            not error.is_printed and (is_main_process() or error.what.startswith("rank "))
        ):
            print(f"error: {shown}", file=sys.stderr, flush=True)
        if as_json and is_main_process():
            names = ("code", "what", "where", "fix")
            print_json({"error": {name: getattr(shown, name) for name in names}})
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def parse(arguments: Sequence[str]) -> tuple[int, Any]:
    """Runs the command named by the arguments, or prints a list of commands; returns the exit code
    and the result."""
    given = list(arguments) or ["--help"]
    group = given.pop(0) if given[0] in GROUPS else ""  # of two words, such as "data check"
    name, start = given[0] if given else "--help", f"{group} " if group else ""
    known = {verb.removeprefix(start): VERBS[verb] for verb in VERBS if verb.startswith(start)}
    commands = {verb: known[verb].summary for verb in known if " " not in verb}
    commands |= {} if group else GROUPS
    if name in ("-h", "--help"):
        print(f"usage: mixer {start}COMMAND [OPTIONS]\n\n{GROUPS.get(group, DESCRIPTION)}\n")
        print("commands:")
        width = max(map(len, commands))
        for verb, summary in commands.items():
            print(f"  {verb:{width}}  {summary}")
        return 0, {"commands": list(commands)}
    if name == "--version":
        print(f"allmlp {version('allmlp')}")
        return 0, {}
    where = f"mixer {group}" if group else None
    one_of("command", name, [*commands, "--help", "--version"], where)
    return known[name].run(f"{start}{name}", given[1:])
