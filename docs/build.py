"""Builds the documentation site: `python docs/build.py [OUTPUT]`, with the extra `docs`.

The pages are docs/, the README, the changelog, benchmarks/, a reference made from the options and
docstrings, and the source files that any of these links to. A link in a document is relative to
that document in the repository, where it also works; here it becomes one between pages.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build" / "pages"  # docs_dir of mkdocs.yml
RENAMED = {"README.md": "index.md"}
COMMAND_LINE = "docs/cli.md"  # the help of every command follows it
LINK = re.compile(r"(\]\(|src=\")([^)#:\s\"]+)")
WIDTH = 86  # characters that a page shows without scrolling
FENCES = {".py": "python", ".sh": "bash", ".toml": "toml"}


def page_of(path: str) -> str:
    """The page of a file of the repository; both are relative paths."""
    if path.startswith("docs/") or path in RENAMED:
        return RENAMED.get(path, path.removeprefix("docs/"))
    return path.lower() if path.endswith(".md") else f"source/{path}.md"


def with_links(text: str, path: str) -> tuple[str, set[str]]:
    """Returns a document with links between pages, and the files that it links to."""
    linked: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        if not (ROOT / target).is_file():
            return match[0]
        linked.add(target)
        folder = posixpath.dirname(page_of(path))
        return match[1] + posixpath.relpath(page_of(target), folder or ".")

    return LINK.sub(replace, text), linked


def commands() -> str:
    """The help of every command, as it is printed."""
    from allmlp.cli.verbs import VERBS

    text = []
    plain = os.environ | {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    for name, command in VERBS.items():
        words = [sys.executable, "-m", "allmlp", *name.split(), "--help"]
        printed = subprocess.run(words, env=plain, capture_output=True, text=True, check=True)
        lines = printed.stdout.splitlines()
        shown = "\n".join(
            textwrap.fill(line, WIDTH) if line[:1].isalpha() else line for line in lines
        )
        text.append(f"## mixer {name}\n\n{command.summary}\n\n```text\n{shown}\n```\n")
    return "\n".join(text)


def python_reference() -> str:
    """The public names; mkdocstrings replaces each by its docstring and source."""
    import allmlp as am

    groups: dict[str, list[str]] = {"Functions": [], "Options": [], "Classes": []}
    for name in am.__all__:
        is_options = name.endswith(("Options", "Config"))
        kind = "Options" if is_options else "Classes" if name[0].isupper() else "Functions"
        groups[kind].append(f"::: {getattr(am, name).__module__}.{name}\n")
    parts = [f"## {title}\n\n" + "\n".join(names) for title, names in groups.items()]
    return "\n".join(["# Python\n\n```python\nimport allmlp as am\n```\n", *parts])


def write_pages() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    documents = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
    waiting = ["README.md", *(path.relative_to(ROOT).as_posix() for path in documents)]
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in done:
            continue
        done.add(path)
        page = PAGES / page_of(path)
        page.parent.mkdir(parents=True, exist_ok=True)
        if path.startswith("docs/") and not path.endswith(".md"):  # an image
            shutil.copyfile(ROOT / path, page)
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".md"):
            text, linked = with_links(text, path)
            waiting += linked
            if path == COMMAND_LINE:
                text += "\n" + commands()
        else:
            kind = FENCES.get(Path(path).suffix, "text")
            text = f"# {path}\n\n~~~~{kind}\n{text}\n~~~~\n"
        page.write_text(text, encoding="utf-8")
    shutil.copyfile(ROOT / "docs" / "site.css", PAGES / "site.css")
    page = PAGES / "reference" / "python.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(python_reference(), encoding="utf-8")


class Page(HTMLParser):
    """The targets of a page's links, and the places that links can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("id", "name"):
                self.places.add(value or "")
            elif key in ("href", "src") and ("rel", "canonical") not in attrs:
                self.links.append(value or "")


def broken_links(site: Path) -> list[str]:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links start at the server's root
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            found = target.exists() and (target not in pages or anchor in pages[target].places)
            if not found and anchor != "__skip":
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def main() -> None:
    site = ROOT / "build" / "site"
    write_pages()
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    documents = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")]
    if left_out := [path for path in documents if f" {page_of(path)}\n" not in menu]:
        sys.exit(f"mkdocs.yml does not list {', '.join(left_out)}")
    build = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    printed = subprocess.run(build, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = printed.stdout.decode().splitlines()
    print("\n".join(lines))
    if printed.returncode or any(line.startswith("griffe:") for line in lines):
        sys.exit("the site has warnings")
    if broken := broken_links(site):
        sys.exit("\n".join(["broken links:", *broken]))
    print(f"{len(list(site.rglob('*.html')))} pages in {site}")


if __name__ == "__main__":
    main()
