"""Models on the Hugging Face hub: "hf:owner/name[@revision]" to files in the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from allmlp.errors import UserError
from allmlp.io import is_reachable
from allmlp.names import HUB_NAME
from allmlp.weights.download import is_offline, sha256_of

PREFIX = "hf:"
# In order of preference; a pickle is the last resort, and read as plain tensors only.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def parse(source: str) -> tuple[str, str | None]:
    """Splits "hf:owner/name[@revision]" into owner/name and the revision, or None."""
    found = re.fullmatch(rf"hf:({HUB_NAME})(?:@([\w./-]+))?", source)
    if not found:
        fix = "hf:owner/name or hf:owner/name@revision"
        raise UserError(f"not a model on the hub: {source!r}", fix=fix)
    return found[1], found[2]


def fetch(name: str, revision: str | None) -> Path:
    """Returns the path of a hub model's weights, with its config.json in the same folder."""
    is_cut_off = not can_reach()
    _get(name, "config.json", revision, is_cut_off)  # optional: the tensors can describe themselves
    for file in WEIGHTS:
        path = _get(name, file, revision, is_cut_off)
        if path is not None:
            blob = path.resolve()  # the hub's cache names large files by their sha256
            if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256_of(blob) != blob.name:
                fix = f"Delete {blob} and load the model again"
                what = "the cached file is damaged: its sha256 is another"
                raise UserError(what, where=path, fix=fix, code="damaged")
            return path
    raise UserError(f"{name} has none of {', '.join(WEIGHTS)}", where="the hub")


def can_reach() -> bool:
    """Whether the hub answers; without a network its library retries for half a minute."""
    from huggingface_hub import constants

    return not is_offline() and is_reachable(constants.ENDPOINT)


def _get(name: str, file: str, revision: str | None, is_cut_off: bool) -> Path | None:
    import huggingface_hub
    from huggingface_hub import constants, errors

    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    try:
        found = huggingface_hub.hf_hub_download(
            name, file, revision=revision, local_files_only=is_cut_off
        )
        return Path(found)
    except errors.LocalEntryNotFoundError as error:
        known = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if known is huggingface_hub._CACHED_NO_EXIST:  # cached as missing on the hub
            return None
        reason = "the hub cannot be reached" if is_cut_off else _cause(error)
        what, where = f"{name} is not in the cache and {reason}", f"{constants.HF_HUB_CACHE}"
        raise UserError(what, where=where, fix=f"With a network: {command}") from error
    except errors.EntryNotFoundError:
        return None
    except Exception as error:  # the hub library can raise anything
        what, fix = f"cannot download {name}: {_cause(error)}", f"By hand: {command}"
        if isinstance(error, errors.RevisionNotFoundError):
            what, fix = f"{name} has no revision {revision!r}", "Leave @revision out for main"
        elif isinstance(error, errors.RepositoryNotFoundError):  # includes gated repositories
            what = f"no model {name!r}, or it is private"
            fix = "If you have access: hf auth login"
        raise UserError(what, where="the hub", fix=fix) from error


def _cause(error: BaseException) -> str:
    first = error.__cause__ or error
    return (str(first) or type(first).__name__).splitlines()[0]
