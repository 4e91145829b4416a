"""UserError: a mistake of the user, not of the program, and how it is shown.

Every message has the same form: what is wrong (with the value), where, what to do about it. On the
command line it ends the program with exit code 2 and no traceback; from Python it is an ordinary
exception that derives from ValueError.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend.

    Args:
        what: what is wrong, with the offending value.
        where: the file, flag or class that it concerns; None where `what` names it.
        fix: what to do or to type; None only where nothing can be done.
    """

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, None if where is None else str(where), fix
        super().__init__(self.text())

    def text(self) -> str:
        """The whole message: one line for each of its parts."""
        lines = [self.what]
        if self.where is not None:
            lines.append(f"where: {self.where}")
        if self.fix is not None:
            lines.append(f"to fix: {self.fix}")
        return "\n".join(lines)


def near_names(name: str, known: Iterable[str]) -> str:
    """Returns 'Did you mean X or Y? ' for the known names nearest to `name`, or ''."""
    near = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}? " if near else ""
