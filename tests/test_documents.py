"""README and docs: every command line parses, every link leads somewhere, the API names exist."""

import ast
import importlib
import inspect
import re
import runpy
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import allmlp as am
from allmlp.cli.main import parse
from allmlp.cli.table import _found
from allmlp.cli.verbs import VERBS
from allmlp.training.model import build_model
from allmlp.weights.checkpoints import CHECKPOINTS
from conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def command_lines(text: str) -> list[str]:
    """Every line that begins with `mixer COMMAND`, in blocks, in `code` and in help texts."""
    lines = re.findall(r"^\s*(?:\$ )?(mixer (?:[^\n`#]|(?<=\S)#)+)", text, flags=re.MULTILINE)
    return lines + re.findall(r"`(mixer [^`\n]+)`", text)


def all_lines() -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    texts += [getattr(*_found(verb.words.split()[0])).__doc__ or "" for verb in VERBS.values()]
    return sorted({line.strip() for text in texts for line in command_lines(text)})


@pytest.mark.parametrize("line", all_lines())
def test_every_printed_command_parses(line: str, monkeypatch: pytest.MonkeyPatch):
    """`mixer train` lines must also give a configuration whose network can be built."""
    calls: list[Any] = []
    words = shlex.split(re.sub(r"\s{2,}\(.*\)$", "", line))
    is_name = " ".join(words[1:]) in VERBS and words[1:] != ["train"]  # in a sentence
    if is_name or words[1] == "COMMAND" or {"--help", "--version", "--config"} & set(words):
        return
    if is_training := words[1] == "train" and "--resume" not in words:
        monkeypatch.setattr("allmlp.training.train.train", lambda config, **_: calls.append(config))
        folded = "allmlp.studies.cross_validate"
        monkeypatch.setattr(folded, lambda config, folds: calls.append(config))
    else:
        for name, command in VERBS.items():
            if name.split()[0] == words[1]:
                module, function = _found(command.words.split()[1])
                monkeypatch.setattr(module, function, lambda *given: calls.append(given))
                monkeypatch.setattr(module, "show", lambda *_: None, raising=False)
    parse([word for word in words[1:] if word not in ("--json", "--quiet", "--debug")])
    assert len(calls) == 1
    if is_training:
        with torch.device("meta"):
            build_model(calls[0], ["a", "b"])


def test_a_wrong_line_would_be_seen():
    found = command_lines("see `mixer modelss` and\n    mixer trin x")
    assert found == ["mixer trin x", "mixer modelss"]


def test_ci_finds_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("train", "test"):
        found = re.findall(rf"<!-- ci: {name} -->\s*```bash\n(.+)\n```", text)
        assert len(found) == 1
    assert text.index("<!-- ci: test -->") < 3000  # on the first screen


@pytest.mark.parametrize(
    "path", sorted({*DOCUMENTS, *ROOT.glob("*.md")}), ids=lambda path: path.name
)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_readme_of_a_release_has_no_relative_link():
    links = runpy.run_path(str(ROOT / "docs" / "release_links.py"))
    text = links["absolute"]((ROOT / "README.md").read_text(encoding="utf-8"), "https://x/y", "v1")
    targets = re.findall(r"\]\(([^)]+)", text)
    assert all(target.startswith("https://") for target in targets)
    assert "](https://x/y/raw/v1/docs/images/mixer.png)" in text
    project = links["with_urls"]((ROOT / "pyproject.toml").read_text("utf-8"), "https://x/y")
    parsed = tomllib.loads(project)["project"]
    assert parsed["urls"]["Repository"] == "https://x/y"
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {parsed['version']}\n" in citation


def test_the_public_names_are_documented():
    assert am.__all__ == sorted(am.__all__)
    for name in am.__all__:
        assert name in dir(am)
        public = getattr(am, name)
        text = public.__doc__ if not isinstance(public, type) else vars(public).get("__doc__")
        assert text, name
        assert not text.startswith(f"{name}("), name  # which a dataclass gets by itself
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = am.nothing


def keywords_of(function: Callable[..., Any]) -> set[str] | None:
    """The keywords of a public function, with the fields of its options; None: any."""
    signature = inspect.signature(function)
    names = {name for name in signature.parameters if name != "fields"}
    if all(of.kind is not of.VAR_KEYWORD for of in signature.parameters.values()):
        return names
    found = re.search(r"(\w+Options)", str(signature.parameters.get("options", "")))
    if found is None:
        return None
    module = importlib.import_module(function.__module__)
    return names | {field.name for field in fields(getattr(module, found[1]))}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents(path: Path):
    """Blocks compile, their imports exist, and functions take the keywords that they are given."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    blocks += [code.replace(", ...", "") for code in re.findall(r"`(am\.\w+\([^`]*\))`", text)]
    for node in (node for code in blocks for node in ast.walk(ast.parse(code))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("allmlp"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "am":
            assert node.attr in am.__all__, f"am.{node.attr}"
        if isinstance(node, ast.Call) and re.fullmatch(r"am\.\w+", ast.unparse(node.func)):
            known = keywords_of(getattr(am, ast.unparse(node.func).removeprefix("am.")))
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            assert known is None or given <= known, ast.unparse(node)


def test_the_number_of_checkpoints():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"(\d+) published checkpoints", text) == [str(len(CHECKPOINTS))]
