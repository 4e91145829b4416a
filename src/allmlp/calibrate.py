"""`am.calibrate` and `mixer calibrate`: a temperature, and a threshold for "unsure"."""

from __future__ import annotations

import copy
import re
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

from allmlp.console import Reporter
from allmlp.errors import plural
from allmlp.evaluate import evaluate
from allmlp.evaluation import calibration
from allmlp.evaluation.metrics import Evaluation
from allmlp.evaluation.options import CalibrateOptions, MeasureOptions
from allmlp.io import atomic_write, expand
from allmlp.models.layers import ImageClassifier
from allmlp.options import Done, make
from allmlp.runtime.device import choose_device
from allmlp.training.card import PROBABILITIES, probabilities_section, public_name
from allmlp.weights.load import files_of, open_model
from allmlp.weights.save import check_target, save_model

_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # of the printed table


def calibrate(
    model: ImageClassifier | str | Path,
    data: str | CalibrateOptions | None = None,
    *,
    report: Reporter | None = None,
    **fields: Any,
) -> tuple[ImageClassifier, Evaluation]:
    """Returns a model with a temperature, and a threshold if one is asked for, and the measurement.

    The weights are shared with the given model, which does not change. No temperature is fitted
    with fewer than 100 images, or if it does not lower the loss of images it was not fitted on.

    Args:
        model: a model with class names, or anything `load_model` accepts.
        data: labelled images that the model was not trained on; or all options as one object.
        report: shows progress; None shows nothing.
        **fields: fields of `CalibrateOptions`.

    Raises:
        UserError: as in `evaluate`; both `accuracy` and `unsure_below`, or
            no threshold reaches the accuracy.
    """
    options = make(CalibrateOptions, data, fields, "data")
    net = open_model(model, **options.loading)
    asked = {"accuracy": options.accuracy, "unsure_below": options.unsure_below}
    is_asked = set(asked.values()) != {None}
    if is_asked:
        net.decision.with_threshold(0.0)  # an error with several labels per image
    own = {field.name for field in fields_of(MeasureOptions)} - {"image_size", "resize_weights"}
    given = {name: getattr(options, name) for name in own}
    if not isinstance(model, ImageClassifier):  # a model object stays where it is
        given["device"] = str(choose_device(options.device))
    result = evaluate(net, options.data, report=report, **given)
    name = public_name(options.data, result.data)
    result = replace(result, decision=calibration.fitted(result, name))
    if is_asked:
        result = replace(result, decision=calibration.with_threshold(result, name, **asked))
    net = copy.copy(net)
    net.decision = result.decision
    return net, result


def command(model: str, output: str, options: CalibrateOptions) -> Done:
    """Writes the calibrated model, with the card of the folder that it comes from."""
    path, report = expand(output), Reporter()
    check_target(path, "allmlp", overwrite=options.overwrite, inputs=files_of(model))
    net, result = calibrate(model, options, report=report)
    weights = save_model(net, path, overwrite=options.overwrite)
    cards = [folder / "README.md" for folder in (expand(model) / "best", expand(model))]
    card = next((card for card in cards if card.is_file()), None)
    if card is not None and path.is_dir():
        text, section = card.read_text("utf-8"), probabilities_section(net.decision)
        pattern = rf"(?ms)^{PROBABILITIES}\n.*?(?=^## )"
        text = re.sub(pattern, lambda _: section, text, count=1)
        atomic_write(path / "README.md", text)
    report.say(f"data     {result.data}: {plural(len(result.labels), 'image')}")
    for line in result.warnings():
        report.say(f"warning  {line}", style="yellow")
    has_temperature = net.decision.temperature != 1.0
    if not has_temperature:
        least = calibration.LEAST_IMAGES
        few = f"there are fewer than {least} images"
        why = few if len(result.labels) < least else "it would not lower the loss"
        why = why if result.rows is None else "the logits of so many images are not kept"
        report.say(f"no temperature: {why}")
    for line in calibration.summary(net.decision):
        report.say(line)
    if not result.is_multi_label:
        measured = calibration.cross_calibrated(result) if has_temperature else result
        formats = {"threshold": ".4g", "coverage": ".2%", "accuracy": ".2%"}
        report.say('\nbelow each threshold the answer is "unsure"; accuracy of the others')
        report.table(map(measured.answered, _THRESHOLDS), formats=formats)
    report.say(f"\nwritten  {weights}")
    return Done({"written": weights, "decision": net.decision, "evaluation": result})
