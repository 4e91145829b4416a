"""The house: a file imports only from its own folder and from floors below; no circles."""

from __future__ import annotations

import ast
from pathlib import Path

import allmlp

PACKAGE = Path(allmlp.__file__).parent
# Upward. What lies directly in the package is one folder under all floors; `__init__` is the door.
FLOORS = [
    {"errors", "preprocessing", "console", "io", "environment"},
    {"runtime"},
    {"models", "data"},
    {"weights", "evaluation", "inspection"},
    {"training"},
    {"studies", "deploy"},
    {"cli"},
]
DOORS = {"__init__", "__main__"}


def floor_of(part: str) -> int:
    return next(level for level, parts in enumerate(FLOORS) if part in parts)


def is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or place.is_dir()


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
        if part in DOORS:
            continue
        for target in imports(path):
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
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) > 25


def test_no_file_is_longer_than_400_lines():
    for path in [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_everything_public_is_documented():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path}: a module says what it is for"
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_":
                assert ast.get_docstring(node), f"{path}: {node.name}"
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                assert all(each.annotation for each in arguments), f"{path}: {node.name}"
                assert node.returns is not None, f"{path}: {node.name} has no return annotation"
