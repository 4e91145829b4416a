"""Shows the command lines under "Examples:" of an options dataclass as code on the site."""

import re
import textwrap
from typing import Any

from griffe import Class, Extension

EXAMPLES = re.compile(r"^Examples(?: of use)?:\n((?:[ ]{4}.*\n?|\n)+)", re.MULTILINE)


class CommandExamples(Extension):
    def on_class_instance(self, *, cls: Class, **_: Any) -> None:
        if cls.docstring is not None and "    mixer " in cls.docstring.value:
            cls.docstring.value = EXAMPLES.sub(_block, cls.docstring.value)


def _block(found: re.Match[str]) -> str:
    return f"For example:\n\n```bash\n{textwrap.dedent(found[1]).strip()}\n```\n"
