"""`mixer throughput`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from tyro.conf import Positional, arg

from allmlp.cli.arguments import (
    Assignments,
    File,
    Number,
    Real,
    Size,
    Text,
    check_json,
    overrides_of,
    parse_size,
    write_json,
)
from allmlp.errors import UserError, near_names, plural

if TYPE_CHECKING:
    from collections.abc import Callable

    from allmlp.models.layers import ImageClassifier
    from allmlp.training.config import TrainConfig

Models = Annotated[Positional[tuple[str, ...]], arg(help_behavior_hint="", metavar="[MODEL ...]")]
BatchSizes = Annotated[
    tuple[int, ...] | None, arg(help_behavior_hint="(default: doubled from 1)", metavar="N ...")
]
ModeName = Annotated[Text, arg(help_behavior_hint="(default: inference)", metavar="MODE")]
Budget = Annotated[Real, arg(help_behavior_hint="(default: 30)", metavar="X")]

# Recipes by the beginning of their names -> training images, classes, where the numbers are from.
_DATA = {
    "imagenet_": (1_281_167, 1000, "ImageNet-1k's training images"),
    "imagenet21k_": (14_000_000, 21_843, "ImageNet-21k, the paper's round number"),
    "jft_": (300_000_000, 18_291, "JFT-300M, the paper's round number"),
    "cifar10": (45_000, 10, "CIFAR-10 less the tenth that is held out"),
    "digits": (1_259, 10, "the scikit-learn digits' training images"),
}


def throughput(
    models: Models = (),
    /,
    *,
    mode: ModeName = None,
    precision: str = "auto",
    compile: str = "off",
    image_size: Size = None,
    batch_sizes: BatchSizes = None,
    seconds: float = 2.0,
    rounds: int = 5,
    budget: Budget = None,
    recipe: Text = None,
    images: Number = None,
    device: str = "auto",
    threads: Number = None,
    settings: Assignments = (),
    output: File = None,
    overwrite: bool = False,
) -> int:
    """Measure images a second, latency, memory and the share of the machine's peak.

    Examples of use:
        mixer throughput mixer_s32
        mixer throughput mixer_s16 mixer_b16 runs/mine --output throughput.json
        mixer throughput mixer_b16 timm:vit_base_patch16_224 --batch-sizes 1 8 32
        mixer throughput mixer_s16 --mode training --precision float32
        mixer throughput mixer_s16 --set token_mixing=untied --batch-sizes 8
        mixer throughput --recipe imagenet_b16

    Several models take turns, so that a disturbance falls on all of them; all are in memory
    together. Ctrl-C ends early and prints what there is.

    Args:
        models: names of `mixer models` or timm:NAME (random weights: the speed is the same), run
            folders, weights files, names of `mixer models --weights`.
        mode: inference, or training: forward, softmax loss, backward and AdamW on random images.
        precision: float32 or bfloat16 products; auto takes what the device is fast at.
        compile: on or off; the time that compiling takes is not counted.
        image_size: at another size than the model's own.
        batch_sizes: images a step; without it they double while the rate rises, memory and the
            budget last.
        seconds: timed at each batch size of each model, and for the latency.
        rounds: into which these seconds are cut; the median of the rounds counts.
        budget: seconds that the doubling may take for each model.
        recipe: a name of docs/recipes.md: the days that it takes on this device, by its training
            step; in place of models.
        images: training images of the recipe's data, where they are not known.
        device: auto, cpu or cuda.
        threads: of the processor; without it torch's own choice, and one for a small batch.
        settings: a field of the architectures, such as token_mixing=untied; may be given many
            times.
        output: a .json file for every figure; - for standard output.
        overwrite: replace a file that is there.
    """
    if recipe is not None and (models or mode == "inference"):
        given = models[0] if models else "--mode inference"
        what = f"{given} has no effect with --recipe, which times its own model's training"
        raise UserError(what, where="--recipe", fix="Leave one of them out")
    if recipe is not None and settings:
        what = f"--set {settings[0]} has no effect with --recipe, which brings its own model"
        raise UserError(what, where="--set", fix="Leave one of them out")
    if recipe is None and not models:
        raise UserError("no model to measure", fix="mixer throughput mixer_s32")
    if images is not None and (recipe is None or images < 1):
        what = "has no effect without --recipe" if recipe is None else "must be at least 1"
        fix = "Leave it out" if recipe is None else "--images N, with the number of the data"
        raise UserError(f"--images {images} {what}", where="--images", fix=fix)
    if compile not in ("on", "off"):
        raise UserError(f"unknown value {compile!r}", where="--compile", fix="on or off")
    if len(set(models)) < len(models):
        twice = next(each for each in models if models.count(each) > 1)
        raise UserError(f"{twice} is named twice", where="models", fix="Name each model once")

    from allmlp.cli.throughput_lines import cost_lines, lines_of
    from allmlp.console import Reporter
    from allmlp.evaluation.throughput import throughput as measure
    from allmlp.io import STANDARD_OUTPUT, check_not_inputs
    from allmlp.weights.load import files_of

    target = check_json(output, "throughput.json", overwrite=overwrite)
    if target is not None:
        check_not_inputs([target], [file for name in models for file in files_of(name)])
        target.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    mode = mode or ("inference" if recipe is None else "training")
    size, builds = parse_size(image_size), {}
    cost = None
    if recipe is not None:
        config, seen, classes, data = _recipe(recipe, images)
        builds[recipe] = _build_of_recipe(config, size, classes, device)
        cost = (config, seen, data)
    for name in models:
        builds[name] = _build(name, size, device, overrides_of(settings, "--set"))
    report = Reporter(stderr=output == STANDARD_OUTPUT)
    tell = _progress(report)
    result = measure(
        builds,
        mode=cast("Literal['inference', 'training']", mode),
        precision=precision,
        compile=compile == "on",
        device=device,
        num_threads=threads,
        batch_sizes=batch_sizes,
        seconds=seconds,
        rounds=rounds,
        budget=budget,
        tell=tell,
    )
    tell("")
    for line in lines_of(result):
        report.say(line)
    values = result.to_json()
    if cost is not None:
        said, figures = cost_lines(result, *cost)
        for line in said:
            report.say(line)
        values["recipe"] = figures
    if output is not None:
        write_json(target, values)
    if target is not None:
        report.say(f"written  {output}{' (incomplete)' if result.interrupted else ''}")
    if result.interrupted:
        raise KeyboardInterrupt
    return 0 if any(each.course.points for each in result.models) else 2


def _progress(report: Any) -> Callable[[str], None]:
    """What shows the work in hand: one line on a terminal that changes, nothing in a pipe."""
    console = report.console

    def tell(line: str) -> None:
        if console.is_terminal:
            console.print(f"\r{line[:90]:<90}", end="\r", markup=False)

    return tell


def _build(
    name: str, size: int | tuple[int, int] | None, device: str, overrides: dict[str, Any]
) -> Callable[[], ImageClassifier]:
    """Returns what builds a model; a name that means nothing is refused at once.

    Raises:
        UserError: there is no such model, or it does not take that size.
    """
    from allmlp.io import expand
    from allmlp.models.catalog import create_model, list_models
    from allmlp.weights.checkpoints import CHECKPOINTS, find_checkpoint
    from allmlp.weights.load import load_model

    if name in list_models() or (name.startswith("timm:") and "." not in name):
        return _new(lambda: create_model(name, size, **overrides), device)
    if overrides:
        what = f"--set {next(iter(overrides))} has no effect on {name}: its weights say what it is"
        raise UserError(what, where="--set", fix="Name an architecture of `mixer models`")
    is_remote = name.startswith(("hf:", "timm:"))
    if not (is_remote or find_checkpoint(name) or expand(name).exists()):
        names = [*list_models(), *CHECKPOINTS]
        fix = f"{near_names(name, names)}See `mixer models` and `mixer models --weights`"
        raise UserError(f"no model, run folder or file is called {name!r}", fix=fix)
    return lambda: load_model(name, size)


def _new(create: Callable[[], ImageClassifier], device: str) -> Callable[[], ImageClassifier]:
    """Returns what builds a model with random weights, after a trial without memory."""
    import torch

    from allmlp.evaluation.throughput import count_parameters
    from allmlp.runtime.device import choose_device, free_memory

    with torch.device("meta"):
        needed = 4 * count_parameters(create())
    where = choose_device(device)

    def build() -> ImageClassifier:
        free = free_memory(where)
        if free is not None and needed > 0.9 * free:
            what = f"the weights take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise MemoryError(f"memory: {what}")
        return create()

    return build


def _recipe(name: str, images: int | None) -> tuple[TrainConfig, int, int, str]:
    """Returns a recipe's settings, the images that it looks at, the classes, and what they are of.

    Raises:
        UserError: no such recipe, it begins with weights, or its data's size is not known.
    """
    from allmlp.training.cost import num_images_seen
    from allmlp.training.recipes import recipe

    config = recipe(name)
    if not config.model.name:
        what = f"the recipe {name} fine-tunes a model of your choice and names none"
        fix = "mixer throughput MODEL --mode training gives the images a second of a step"
        raise UserError(what, where="--recipe", fix=fix)
    found = next((each for start, each in _DATA.items() if name.startswith(start)), None)
    number, classes, of = found or (None, 1000, "")
    if config.steps is not None and images is not None:
        what = f"--images {images} has no effect: {name} is {plural(config.steps, 'step')} long"
        raise UserError(what, where="--images", fix="Leave it out")
    if images is not None:
        number, of = images, "as given"
    if number is None:
        what = f"how many training images {name} has is not known"
        raise UserError(what, where="--recipe", fix="Add --images N")
    return config, num_images_seen(config, number), classes, f"{plural(number, 'image')} ({of})"


def _build_of_recipe(
    config: TrainConfig, size: int | tuple[int, int] | None, classes: int, device: str
) -> Callable[[], ImageClassifier]:
    from allmlp.models.catalog import create_model

    settings = config.model
    pixels = settings.image_size if size is None else size
    return _new(lambda: create_model(settings.name, pixels, classes, **settings.overrides), device)
