"""Runs the tutorials' blocks behind `<!-- run -->`, and the notebooks, in a temporary folder.

`<!-- run: NAME -->` stands before a script and names its file. A block that fails ends the program.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"<!-- run(?:: (\S+))? -->\n```(\w+)\n(.*?)```", re.DOTALL)


def main() -> None:
    found = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        for name in ("own_images.md", "deployment.md", "paper.md"):
            for script, kind, code in BLOCK.findall((TUTORIALS / name).read_text("utf-8")):
                print(f"--- {name}\n{code}", flush=True)
                if kind == "python":
                    Path(folder, script).write_text(code, "utf-8")
                    code = f"{sys.executable} {script}"
                words = ["bash", "-euc", code]
                subprocess.run(words, cwd=folder, env=os.environ | {"PATH": found}, check=True)
    for path in sorted(ROOT.glob("examples/*.ipynb")):
        print(f"--- {path.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            notebook = nbformat.read(path, as_version=4)
            NotebookClient(notebook, resources={"metadata": {"path": folder}}).execute()


if __name__ == "__main__":
    main()
