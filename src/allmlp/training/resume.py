"""Which run a command means: a new one, or one of ours that goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from allmlp.data.fingerprint import is_fingerprint_of
from allmlp.errors import UserError
from allmlp.io import parse_json
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Splits

# Settings that change where and how fast a run computes, but not what: they may differ when the
# run goes on.
_FREE = {
    *("output", "device", "num_threads", "micro_batch_size", "compile", "sharding"),
    *("tensorboard", "keep_checkpoints", "checkpoint_every", "data.num_workers", "data.timeout"),
    "data.max_bad",
}
# What is there of a run that was ended before its first step.
_BEGUN = {"plots", "checkpoints", ".lock", "config.json", "environment.json", "log.txt"}
_BEGUN |= {"training_images.txt"}


def config_of(run: str | Path) -> TrainConfig:
    """Returns the settings of a run folder, with that folder as its output.

    Raises:
        UserError: it is no run folder of ours.
    """
    folder = Path(run).expanduser()
    path = folder / "config.json"
    if not path.is_file():
        what = "there is no such run folder" if not folder.exists() else "not a run folder"
        fix = "Give the folder that `results` named when the run began"
        raise UserError(f"{what}: it has no config.json", where=folder, fix=fix)
    try:
        values = parse_json(path.read_bytes())
        if not isinstance(values, dict) or "recipe" not in values:
            what = "this config.json is not that of a training run"
            raise UserError(what, where=path, fix="Give the run folder, not best/")
        return replace(TrainConfig.from_json(values), output=str(run))
    except ValueError as error:
        if isinstance(error, UserError):
            raise UserError(error.what, where=error.where or path, fix=error.fix) from error
        raise UserError(f"not valid JSON: {error}", where=path) from error


def goes_on(path: Path, config: TrainConfig) -> bool:
    """Returns whether the folder holds this very run, to be continued; False for an unused one.

    Args:
        path: of the run folder.
        config: what was asked for.

    Raises:
        UserError: something else is there, or a run with other settings.
    """
    if path.is_file():
        raise UserError("the run folder is a file", where=path, fix="Give another --output")
    if not path.is_dir():
        return False
    there = {each.name for each in path.iterdir() if not each.name.endswith(".partial")}
    has_begun = any((path / "checkpoints").glob("*")) or not there <= _BEGUN
    if not there or ("plots" in there and not has_begun):
        return False
    if "config.json" not in there:
        what = "the run folder exists and is not empty; a run never writes over another"
        raise UserError(what, where=path, fix="Give another --output or remove it")
    check_same(config_of(path), config)
    if (path / "best").exists() and not (path / "checkpoints").is_dir():
        what = "the run folder holds a run without checkpoints, which cannot be continued"
        raise UserError(what, where=path, fix="Give another --output or remove it")
    return True


def check_same(old: TrainConfig, new: TrainConfig) -> None:
    """Raises UserError where two runs would compute different things, naming the settings.

    Where the images lie is none of them; see `check_same_images`.
    """
    changes = differences(old, new)
    changes = [each for each in changes if each.partition(" ")[0] != "data.source"]
    if changes:
        path = old.output
        what = f"the run folder holds a run with other settings: {'; '.join(changes[:6])}"
        fix = f"Give another --output, or go on with that run as it is: mixer train --resume {path}"
        if any(each.partition(" ")[0] in ("epochs", "steps") for each in changes):
            fix += f". To train its weights for longer: mixer finetune {path} --data SOURCE"
        raise UserError(what, where=path, fix=fix)


def check_same_images(path: Path, config: TrainConfig, splits: Splits) -> None:
    """Refuses to go on with other images than a run began with; they may have been moved.

    Args:
        path: of the run folder.
        config: what was asked for.
        splits: its images.

    Raises:
        UserError: the images are others, as far as can be known.
    """
    old = config_of(path).data.source
    try:
        known = parse_json((path / "environment.json").read_bytes())["data"]
        is_same = is_fingerprint_of(known["fingerprint"], splits.train)
        if old != config.data.source:
            for name, source in (("validation", splits.validation), ("test", splits.test)):
                if known.get(name) is not None:  # an older version kept none
                    is_same &= source is not None and is_fingerprint_of(known[name], source)
    except (OSError, ValueError, KeyError, TypeError):
        is_same = old == config.data.source  # the checkpoints tell
    if not is_same:
        what = "the images are not those that the run began with"
        if old != config.data.source:
            what += f": data.source is {old!r} there and {config.data.source!r} here"
        fix = "Bring them back, or begin a new run: --output FOLDER"
        raise UserError(what, where=path, fix=fix)


def identity(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that decide what a run computes: path of the setting -> JSON value."""
    return {key: value for key, value in _flat(config.to_json()).items() if key not in _FREE}


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Returns a line for each setting in which two runs would compute different things."""
    before, after = identity(old), identity(new)
    return [
        f"{key} is {before.get(key)!r} there and {after.get(key)!r} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
