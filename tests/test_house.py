"""The house: a file imports only from its own folder and from floors below; no circles."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import allmlp

PACKAGE = Path(allmlp.__file__).parent
# Upward. Files directly in the package stand on the floor where their name is listed.
FLOORS = [
    {
        *("names", "errors", "options", "preprocessing", "decision", "console", "log", "io"),
        *("environment", "page"),
    },
    {"runtime"},
    {"data"},
    {"models"},
    {"weights", "plots"},
    {"evaluation"},
    {"inspection", "training"},
    {"sweep"},
    {"deploy", "studies"},
    {"evaluate", "benchmark", "label_mistakes"},
    {"calibrate"},
    {"paper"},
    {"cli"},
]
DOORS = {"__init__", "__main__"}


def floor_of(part: str) -> int:
    return next(level for level, parts in enumerate(FLOORS) if part in parts)


def is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or place.is_dir()


@functools.cache
def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, also for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("allmlp")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module and node.module.split(".")[0] == "allmlp":
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name for name in names if is_module(name)} or {node.module}
    return found


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(("allmlp", *parts)).removesuffix(".__init__")] = path
    return found


def test_no_import_goes_upward():
    checked = 0
    for name, path in modules().items():
        part = name.split(".")[1] if "." in name else "__init__"
        for target in imports(path):
            if part in DOORS:
                assert not target.startswith("allmlp.paper"), f"{name} imports {target}"
                continue
            assert target != "allmlp", f"{name} imports the package's door"
            other = target.split(".")[1]
            if other == part or {other, part} <= FLOORS[0]:
                continue
            assert floor_of(other) < floor_of(part), f"{name} imports {target}"
            checked += 1
    assert checked > 40


def test_there_are_no_circles():
    graph = {name: imports(path) & set(modules()) for name, path in modules().items()}
    graph = {name: targets for name, targets in graph.items() if name.count(".")}
    assert len(list(TopologicalSorter(graph).static_order())) > 25
