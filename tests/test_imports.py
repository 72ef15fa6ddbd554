"""The shape of the code: imports go one way, files and functions stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "makeweight"
FILES = sorted(PACKAGE.rglob("*.py"))
CODE = sorted(path for folder in ("src", "recipes", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 300, 60

BASE = {"errors", "paths", "numerics"}
LEAF = BASE | {"recipe", "models", "calib"}
ENGINE = LEAF | {"methods", "sweep", "plan"}
# What a room may import besides itself; a name stands for the module and everything in it. A new room needs a line.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "paths": {"errors"},
    "numerics": {"errors"},
    "recipe": BASE,
    "models": BASE | {"recipe"},
    "calib": BASE | {"recipe", "models"},
    "methods": BASE | {"recipe", "models", "calib"},
    "sweep": BASE | {"recipe", "models", "calib", "methods.base"},
    "effort": BASE | {"recipe"},
    "options": BASE | {"recipe", "effort", "plan"},
    "plan": BASE | {"recipe", "models", "calib", "methods"},
    "estimate": BASE | {"recipe", "models", "calib", "methods", "sweep", "plan", "evals"},
    "export": LEAF,
    "evals": LEAF,
    "report": LEAF | {"", "evals"},
    "store": LEAF | {"methods", "sweep", "export"},
    "job": ENGINE | {"", "estimate", "export", "report", "store"},
    "pipeline": ENGINE | {"export", "report", "job"},
    "demo": ENGINE | {"report", "pipeline"},
    "cli": ENGINE | {"", "options", "export", "evals", "report", "pipeline", "demo"},
    "": ENGINE | {"effort", "export", "evals", "report", "pipeline"},
}


def name_of(path: Path) -> str:
    """Name a file's module relative to the package: "numerics.grid", or "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES} | {name_of(path).rpartition(".")[0] for path in FILES}


def imports(tree: ast.AST, module: str, package: bool) -> Iterator[str]:
    """Yield the full names of everything imported, at any depth; names taken from a package count as its modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["makeweight", *module.split(".")]
                above = here[: len(here) - node.level + (1 if package else 0)]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix("makeweight.")
                yield f"makeweight.{inner}" if base.startswith("makeweight") and inner in MODULES else base


def allowed(source: str, target: str) -> bool:
    """Say whether module `source` may import module `target`, both relative to the package."""
    room = source.partition(".")[0]
    if target == "" or target.partition(".")[0] == room:
        return True
    return any(target == name or target.startswith(f"{name}.") for name in ALLOWED[room])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    module = name_of(path)
    assert module.partition(".")[0] in ALLOWED, f"{path.name}: give the new room a line in ALLOWED"
    for name in imports(ast.parse(path.read_text()), module, path.name == "__init__.py"):
        root, _, target = name.partition(".")
        assert root not in ("recipes", "benchmarks", "tests"), (
            f"{module} imports {name}, which is no part of the package"
        )
        if root == "makeweight":
            assert allowed(module, target), f"{module} must not import {target}: imports go one way"


def test_the_guard_sees() -> None:
    assert not allowed("numerics.grid", "models.spec")
    assert not allowed("methods.weight.sde", "sweep.fit")
    assert not allowed("sweep.fit", "methods.weight.sde")
    assert not allowed("sweep.fit", "methods")
    assert not allowed("models.load", "report.tables")
    assert allowed("sweep.fit", "methods.base")
    assert allowed("pipeline", "sweep.fit")
    found = set(
        imports(ast.parse("from makeweight import recipe\nfrom .grid import x\nimport torch.nn"), "numerics.svd", False)
    )
    assert found == {"makeweight.recipe", "makeweight.numerics.grid", "torch.nn"}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_small_pieces(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < MAX_FILE, f"{path.name} is long: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines < MAX_FUNCTION, f"{path.name}: {node.name} has {lines} lines, split it"
