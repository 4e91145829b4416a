"""Gives the README and pyproject.toml the repository's address, which only its host knows.

python docs/release_links.py https://github.com/OWNER/NAME v0.1.0

The publishing workflow calls it before it builds: PyPI shows the README where relative links lead
nowhere. The files are changed in place.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)#:\s]+)")


def absolute(text: str, url: str, tag: str) -> str:
    """Returns the README with links to the repository at this tag."""

    def replace(match: re.Match[str]) -> str:
        kind = "raw" if match[1].endswith(".png") else "blob"
        return f"]({url}/{kind}/{tag}/{match[1]}"

    return LINK.sub(replace, text)


def with_urls(text: str, url: str) -> str:
    """Returns pyproject.toml with the addresses that PyPI shows beside the README."""
    urls = f'[project.urls]\nRepository = "{url}"\nIssues = "{url}/issues"\n\n'
    return text.replace("[project.scripts]", urls + "[project.scripts]", 1)


def main(url: str, tag: str) -> None:
    readme, project = ROOT / "README.md", ROOT / "pyproject.toml"
    readme.write_text(absolute(readme.read_text("utf-8"), url, tag), "utf-8")
    project.write_text(with_urls(project.read_text("utf-8"), url), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
