"""`am.push` and `mixer push`: a model and its card to the Hugging Face hub, in one commit."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from allmlp.console import Reporter
from allmlp.deploy.formats import open_exported
from allmlp.deploy.options import PushOptions
from allmlp.errors import UserError
from allmlp.io import expand
from allmlp.models.layers import ImageClassifier
from allmlp.names import HUB_NAME
from allmlp.options import make
from allmlp.training.card import plain_card, published_card
from allmlp.weights.description import CONFIG, WEIGHTS
from allmlp.weights.download import HUB_PREFIX, can_reach_hub
from allmlp.weights.load import locate, open_model, weights_fingerprint
from allmlp.weights.save import save_model

CARD, EXPORT = "README.md", "model.onnx"


@dataclass(frozen=True)
class Pushed:
    """An upload to the hub.

    Attributes:
        url: of the model's page.
        commit: the commit's hash.
        files: their names in the repository.
        source: loads the model, as in `am.load_model(source)`.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    source: str


def push(
    model: ImageClassifier | str | Path,
    repo: str,
    options: PushOptions | None = None,
    *,
    token: str | None = None,
    **fields: Any,
) -> Pushed:
    """Uploads a model to the Hugging Face hub in one commit; a failed upload changes nothing there.

    Args:
        model: a run folder, whose card is uploaded as well, anything else that `load_model` takes,
            or a model.
        repo: owner/name; a repository that does not exist is made.
        options: all options as one object.
        token: for the hub; by default HF_TOKEN, or that of `hf auth login`.
        **fields: fields of `PushOptions`.

    Raises:
        UserError: not a name of the hub, no token or one that may not write there, no network, a
            model.onnx that was not made from the weights, or as `load_model`.
    """
    options = make(PushOptions, options, fields)
    if not re.fullmatch(HUB_NAME, repo):
        what = f"not a name on the hub: {repo!r}"
        raise UserError(what, where="repo", fix="owner/name, with your own name or organisation")
    images = [expand(path) for path in options.examples]
    for path in images:
        if not path.is_file():
            raise UserError("there is no such image", where=path, fix="Leave it out of examples")
    if len({path.name for path in images}) < len(images):
        what = "two of the images have the same name"
        raise UserError(what, where="examples", fix="Rename one", code="conflict")
    folder = None if isinstance(model, ImageClassifier) else expand(model)
    net = open_model(model)
    exported = folder / EXPORT if folder is not None and (folder / EXPORT).is_file() else None
    if exported is not None:
        _check_made_from(exported)
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    if not can_reach_hub():
        what, fix = f"{constants.ENDPOINT} cannot be reached", "Try again with a network"
        raise UserError(what, where=repo, fix=fix, code="offline")
    name = repo if options.revision is None else f"{repo}@{options.revision}"
    page = f"{constants.ENDPOINT}/{repo}"
    changes: dict[str, Any] = {} if options.license is None else {"license": options.license}
    if images:
        at = f"{page}/resolve/{options.revision or 'main'}/examples"
        changes["widget"] = [
            {"src": f"{at}/{quote(path.name)}", "example_title": path.stem} for path in images
        ]
    card = plain_card(net)
    for own in () if folder is None else (folder / "best", folder):
        if (own / CARD).is_file() and (own / WEIGHTS).is_file():
            card = (own / CARD).read_text("utf-8", "replace")
            break
    card = published_card(card, name, changes)
    with tempfile.TemporaryDirectory() as staged:
        save_model(net, staged)
        files: dict[str, Path | bytes] = {name: Path(staged, name) for name in (WEIGHTS, CONFIG)}
        files[CARD] = card.encode(errors="backslashreplace")
        if exported is not None:
            files[EXPORT] = exported
        files |= {f"examples/{path.name}": path for path in images}
        contents = [CommitOperationAdd(name, content) for name, content in files.items()]
        api = HfApi(token=token)
        branch, message = options.revision, options.message
        try:
            api.create_repo(repo, private=options.private or None, exist_ok=True)
            if branch is not None:
                api.create_branch(repo, branch=branch, exist_ok=True)
            done = api.create_commit(repo, contents, commit_message=message, revision=branch)
        except Exception as error:  # the hub library can raise anything
            raise _refused(repo, error) from error
    return Pushed(page, done.oid, tuple(files), f"{HUB_PREFIX}{name}")


def _check_made_from(exported: Path) -> None:
    """Raises UserError if the file was not exported from the present weights of its folder."""
    folder, made_from = exported.parent, open_exported(exported, num_threads=1).info.weights
    if made_from is None:  # by an older version, or from a model in memory
        weights, _ = locate(folder, Reporter(quiet=True))
        is_same = exported.stat().st_mtime >= weights.stat().st_mtime
    else:
        is_same = made_from == weights_fingerprint(str(folder))
    if not is_same:
        what = "the exported file was not made from the weights beside it"
        fix = f"Remove it, or mixer export {folder} --output {exported} --overwrite"
        raise UserError(what, where=exported, fix=fix, code="stale")


def _refused(repo: str, error: Exception) -> UserError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    what = (str(cause) or type(cause).__name__).splitlines()[0]
    fix = "Nothing was changed there; the same command tries again"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
        what, fix = "not logged in to the hub", "hf auth login, or set HF_TOKEN"
    elif status == 403:
        what, fix = "your token may not write there", "A token with write permission"
    return UserError(f"cannot push to {repo}: {what}", where="the hub", fix=fix, code="refused")


def show(result: Pushed, _: PushOptions) -> None:
    print(f"pushed   {', '.join(result.files)}")
    print(f"page     {result.url}")
    print(f'load     allmlp.load_model("{result.source}")')
