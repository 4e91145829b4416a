"""Which run is meant: a new one, or one that is resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from allmlp.data.fingerprint import is_fingerprint_of
from allmlp.errors import UserError
from allmlp.io import parse_json
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Splits

# Settings that change where and how fast a run computes, but not what: they may differ on resume.
_FREE = {
    *("output", "device", "num_threads", "micro_batch_size", "compile", "sharding"),
    *("tensorboard", "keep_checkpoints", "checkpoint_every", "data.num_workers", "data.timeout"),
    "data.max_bad",
}
# What a run leaves that was ended before its first step.
_BEGUN = {"plots", "checkpoints", ".lock", "config.json", "environment.json", "log.txt"}
_BEGUN |= {"training_images.txt"}
_OTHER_OUTPUT = "Choose another output folder, or remove this one"


def config_of(run: str | Path) -> TrainConfig:
    """Returns the settings of a run folder, with that folder as its output."""
    folder = Path(run).expanduser()
    path = folder / "config.json"
    if not path.is_file():
        what = "there is no such run folder" if not folder.exists() else "not a run folder"
        fix = "Give the folder that `results` named when the run began"
        raise UserError(f"{what}: it has no config.json", where=folder, fix=fix, code="no-run")
    try:
        values = parse_json(path.read_bytes())
        if not isinstance(values, dict) or "recipe" not in values:
            what = "this config.json is not that of a training run"
            raise UserError(what, where=path, fix="Give the run folder, not best/", code="no-run")
        return replace(TrainConfig.from_json(values), output=str(run))
    except ValueError as error:
        if isinstance(error, UserError):
            where = error.where or path
            raise UserError(error.what, where=where, fix=error.fix, code=error.code) from error
        raise UserError(f"not valid JSON: {error}", where=path) from error


def can_resume(path: Path, config: TrainConfig) -> bool:
    """Returns whether the folder holds this very run; False for an unused one, else UserError."""
    if path.is_file():
        raise UserError("the run folder is a file", where=path, fix=_OTHER_OUTPUT)
    if not path.is_dir():
        return False
    found = {entry.name for entry in path.iterdir() if not entry.name.endswith(".partial")}
    has_begun = any((path / "checkpoints").glob("*")) or not found <= _BEGUN
    if not found or ("plots" in found and not has_begun):
        return False
    if "config.json" not in found:
        what = "the run folder exists and is not empty; a run never overwrites another"
        raise UserError(what, where=path, fix=_OTHER_OUTPUT)
    check_same(config_of(path), config)
    if (path / "best").exists() and not (path / "checkpoints").is_dir():
        what = "the run folder holds a run without checkpoints, which cannot be resumed"
        raise UserError(what, where=path, fix=_OTHER_OUTPUT)
    return True


def check_same(old: TrainConfig, new: TrainConfig) -> None:
    """Raises UserError naming the settings in which two runs would compute different things.

    Where the images are is not one of them; see `check_same_images`.
    """
    changes = differences(old, new)
    changes = [line for line in changes if line.partition(" ")[0] != "data.source"]
    if changes:
        path = old.output
        what = f"the run folder holds a run with other settings: {'; '.join(changes[:6])}"
        fix = f"Choose another output folder, or resume that run: mixer train --resume {path}"
        if any(line.partition(" ")[0] in ("epochs", "steps") for line in changes):
            fix += f". To train its weights for longer: mixer finetune {path} --data SOURCE"
        raise UserError(what, where=path, fix=fix, code="other-run")


def check_same_images(path: Path, config: TrainConfig, splits: Splits) -> None:
    """Raises UserError if the images differ from those the run began with; they may have moved."""
    old = config_of(path).data.source
    try:
        known = parse_json((path / "environment.json").read_bytes())["data"]
        is_same = is_fingerprint_of(known["fingerprint"], splits.train)
        if old != config.data.source:
            for name, source in (("validation", splits.validation), ("test", splits.test)):
                if known.get(name) is not None:  # older versions wrote none
                    is_same &= source is not None and is_fingerprint_of(known[name], source)
    except (OSError, ValueError, KeyError, TypeError):
        is_same = old == config.data.source  # the checkpoints tell
    if not is_same:
        what = "the images differ from those that the run began with"
        if old != config.data.source:
            what += f": data.source is {old!r} there and {config.data.source!r} here"
        fix = "Restore them, or begin a new run in another output folder"
        raise UserError(what, where=path, fix=fix, code="other-data")


def identity(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that decide what a run computes: path of the setting -> JSON value."""
    return {key: value for key, value in flat(config.to_json()).items() if key not in _FREE}


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Returns a line for each setting in which two runs would compute different things."""
    before, after = identity(old), identity(new)
    return [
        f"{key} is {before.get(key)!r} there and {after.get(key)!r} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested JSON values by their paths."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
