"""What the flags of several verbs share: their types, and how bad images are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from allmlp.console import report_bad_images, report_notes
from allmlp.errors import UserError

if TYPE_CHECKING:
    from allmlp.training.config import TrainConfig

# The types of the flags, with what the help calls their values.
Recipe = Annotated[Positional[str | None], arg(help_behavior_hint="", metavar="[RECIPE]")]
Model = Annotated[Positional[str], arg(metavar="MODEL")]
Target = Annotated[Positional[str], arg(metavar="OUT")]
Inputs = Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES")]
Text = Annotated[str | None, arg(help_behavior_hint="", metavar="TEXT")]
DataName = Annotated[str | None, arg(help_behavior_hint="", metavar="SOURCE")]
RequiredData = Annotated[str, arg(metavar="SOURCE")]
Size = Annotated[str | None, arg(help_behavior_hint="", metavar="PIXELS|HxW")]
Source = Annotated[str | None, arg(help_behavior_hint="", metavar="FILE")]
Format = Annotated[str | None, arg(help_behavior_hint="", metavar="FORMAT")]
ResizeWeights = Annotated[str | None, arg(help_behavior_hint="(default: auto)", metavar="METHOD")]
Folder = Annotated[str | None, arg(help_behavior_hint="", metavar="FOLDER")]
File = Annotated[str | None, arg(help_behavior_hint="", metavar="FILE")]
Number = Annotated[int | None, arg(help_behavior_hint="", metavar="N")]
Real = Annotated[float | None, arg(help_behavior_hint="", metavar="X")]
Rates = Annotated[tuple[float, ...] | None, arg(help_behavior_hint="", metavar="[LR ...]")]
Seeds = Annotated[tuple[int, ...], arg(help_behavior_hint="", metavar="N ...")]
Assignments = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE")]


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """Returns 224 of "224" and (192, 256) of "192x256".

    Raises:
        UserError: the text is neither.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    is_number = [part.isdecimal() and len(part) < 7 and int(part) > 0 for part in parts]
    if not (1 <= len(parts) <= 2 and all(is_number)):
        fix = "a number such as 224, or height x width such as 192x256"
        raise UserError(f"not an image size: {text!r}", where="--image-size", fix=fix)
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def changed(config: TrainConfig, flags: dict[str, Any], settings: tuple[str, ...]) -> TrainConfig:
    """Returns the settings after the flags that were given, and after every --set.

    Raises:
        UserError: no such setting, or a value that it cannot have.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    return config.with_values(given, settings)


def overrides_of(assignments: tuple[str, ...], flag: str) -> dict[str, Any]:
    """Returns {"width": 40} of ("width=40",).

    Args:
        assignments: KEY=VALUE each.
        flag: that gave them, for the message.

    Raises:
        UserError: one of them is written otherwise.
    """
    from allmlp.training.config import literal

    found: dict[str, Any] = {}
    for each in assignments:
        key, equals, value = each.partition("=")
        if not equals or not key.strip():
            what = f"a setting is written KEY=VALUE, got {each!r}"
            raise UserError(what, where=flag, fix=f"{flag} num_blocks=4")
        found[key.strip()] = literal(value.strip())
    return found


def warn_of_notes(*sources: Any) -> None:
    """Says on standard error what else was found where the images lie."""
    from allmlp.data.sources import notes_of

    report_notes(notes_of({str(at): source for at, source in enumerate(sources)}))


warn_of_bad = report_bad_images
