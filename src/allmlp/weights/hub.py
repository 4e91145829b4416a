"""Models on the Hugging Face hub: "hf:owner/name[@revision]" -> files in the hub's own cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from allmlp.errors import UserError
from allmlp.io import is_reachable
from allmlp.weights.download import is_offline, sha256_of

PREFIX = "hf:"
# In this order; a pickle only where there is nothing else, and read as plain tensors.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class HubModel:
    """A model on the hub.

    Attributes:
        owner_and_name: as in the address of its page.
        revision: a branch, tag or commit; None is the main branch.
    """

    owner_and_name: str
    revision: str | None

    @property
    def command(self) -> str:
        """The line that fetches it by hand."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.owner_and_name}{revision}"


def parse(source: str) -> HubModel:
    """Returns the model that "hf:owner/name[@revision]" names.

    Raises:
        UserError: it is not of that form.
    """
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not found:
        fix = "hf:owner/name or hf:owner/name@revision"
        raise UserError(f"not a model on the hub: {source!r}", fix=fix)
    return HubModel(found[1], found[2])


def fetch(model: HubModel) -> Path:
    """Returns the weights of a model on the hub, its config.json beside them where it has one.

    Files come from the hub's cache (HF_HOME) where they are there; HF_HUB_OFFLINE is respected.

    Raises:
        UserError: no such model, revision or weights in it, no permission, or no network.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    # Without a network the hub's library tries for half a minute; one look is enough.
    cache_only = is_offline() or not is_reachable(constants.ENDPOINT)

    def get(name: str) -> Path | None:
        try:
            found = huggingface_hub.hf_hub_download(
                model.owner_and_name, name, revision=model.revision, local_files_only=cache_only
            )
        except errors.LocalEntryNotFoundError as error:
            known = huggingface_hub.try_to_load_from_cache(
                model.owner_and_name, name, revision=model.revision
            )
            if known is huggingface_hub._CACHED_NO_EXIST:  # it was asked for before
                return None
            reason = (
                "the hub cannot be reached" if cache_only else f"the hub fails: {_cause(error)}"
            )
            what = f"{model.owner_and_name} is not in the cache and {reason}"
            where = f"{constants.HF_HUB_CACHE} ({name})"
            fix = f"With a network: {model.command}"
            raise UserError(what, where=where, fix=fix) from error
        except errors.RevisionNotFoundError as error:
            what = f"{model.owner_and_name} has no revision {model.revision!r}"
            raise UserError(what, where="the hub", fix="Leave @revision out for main") from error
        except errors.GatedRepoError as error:
            what = f"{model.owner_and_name} is given to registered users only"
            raise UserError(
                what, where="the hub", fix="Ask on its page, then: hf auth login"
            ) from (error)
        except errors.RepositoryNotFoundError as error:
            what = f"no model {model.owner_and_name!r}, or it is private"
            raise UserError(
                what, where="the hub", fix="For a private one: hf auth login"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # whatever the hub's library and its network layer raise
            what = f"cannot fetch {model.owner_and_name}: {_cause(error)}"
            raise UserError(what, where="the hub", fix=f"By hand: {model.command}") from error
        return Path(found)

    get("config.json")  # beside the weights; without one the tensors say what they are
    for name in WEIGHTS:
        path = get(name)
        if path is not None:
            _check(path)
            return path
    what = f"{model.owner_and_name} has none of {', '.join(WEIGHTS)}"
    raise UserError(what, where="the hub")


def _cause(error: BaseException) -> str:
    """Returns the first line of an error, or of what it was raised from."""
    first = error.__cause__ or error
    return (str(first) or type(first).__name__).splitlines()[0]


def _check(path: Path) -> None:
    """The hub's cache calls a large file by its sha256; a damaged one has another."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256_of(blob) != blob.name:
        fix = f"Delete {blob} and load the model again"
        raise UserError("the cached file is damaged: its sha256 is another", where=path, fix=fix)
