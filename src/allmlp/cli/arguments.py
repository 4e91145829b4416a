"""What the flags of several verbs share: their types, and how bad images are told."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, cast

from tyro.conf import Positional, UseAppendAction, arg

from allmlp.console import report_bad_images, report_notes
from allmlp.errors import UserError

if TYPE_CHECKING:
    from allmlp.models.layers import ImageClassifier
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


def load_named(
    source: str,
    image_size: str | None,
    resize_weights: str | None,
    num_classes: int | None = None,
    *,
    exported: bool = False,
) -> ImageClassifier:
    """Returns the model that the flags of a verb name.

    Args:
        source, image_size, resize_weights, num_classes: as of `load_model`.
        exported: take files of the verb export too, which only compute logits.

    Raises:
        UserError: as `load_model`; or an exported file where none is taken.
    """
    from allmlp.deploy.runner import is_exported, open_exported

    if is_exported(source):
        return open_exported(refuse_changes(source, image_size, resize_weights, exported))
    from allmlp.models.resize import RESIZE_WEIGHTS
    from allmlp.weights.load import load_model

    if resize_weights is not None and resize_weights not in RESIZE_WEIGHTS:
        fix = f"Known: {', '.join(RESIZE_WEIGHTS)}"
        raise UserError(
            f"unknown resize_weights {resize_weights!r}", where="--resize-weights", fix=fix
        )
    if resize_weights is not None and image_size is None:
        what = "--resize-weights says how to reach another image size, and none is given"
        raise UserError(
            what, where="--resize-weights", fix="Add --image-size, or leave --resize-weights out"
        )
    size = parse_size(image_size)
    return load_model(
        source, size, num_classes, resize_weights=cast("Any", resize_weights or "auto")
    )


def refuse_changes(
    source: str, image_size: str | None, resize_weights: str | None, exported: bool
) -> str:
    """Returns the name of an exported file that is taken as it is.

    Raises:
        UserError: the verb needs weights, or it is to have another image size.
    """
    from allmlp.runtime.device import no_weights

    if not exported:
        raise no_weights(source)
    flag = (
        "--image-size"
        if image_size is not None
        else "--resize-weights"
        if resize_weights is not None
        else None
    )
    if flag is not None:
        what = "an exported file has one image size, which cannot be changed"
        raise UserError(what, where=flag, fix="Leave it out, or export it at that size")
    return source


def refuse_device(source: str, device: str) -> str:
    """Returns the device that a flag names; of an exported file, the processor.

    Raises:
        UserError: another is named for an exported file.
    """
    from allmlp.deploy.runner import is_exported
    from allmlp.runtime.device import check_device_of_exported

    if not is_exported(source):
        return device
    check_device_of_exported(device)
    return "cpu"


def warn_of_numbers(net: ImageClassifier) -> None:
    """Says on standard error where classes have numbers for names."""
    if not net.class_names:
        note = "the model carries no class names: classes are called by their number, from 0"
        print(f"note: {note}", file=sys.stderr)


def warn_of_notes(*sources: Any) -> None:
    """Says on standard error what else was found where the images lie."""
    from allmlp.data.sources import notes_of

    report_notes(notes_of({str(at): source for at, source in enumerate(sources)}))


warn_of_bad = report_bad_images
