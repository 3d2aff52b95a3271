"""The rooms of the package and their floors: every import is read, and one that leads upwards or in a circle fails."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import hf_kprune


PACKAGE = Path(hf_kprune.__file__).parent

FLOORS = [
    ["version", "text", "modeling_kprune"],
    ["errors"],
    ["validation", "processes", "progress", "files", "reports"],
    ["options"],
    ["methods"],
    ["combinations"],
    ["arguments", "structure"],
    ["calibration"],
    ["latency", "memory", "entries", "history"],
    ["charts"],
    ["report"],
    ["sizes"],
    ["budgets"],
    ["checkpoint"],
    ["callbacks"],
    ["state", "algorithm"],
    ["evaluation", "publication", "runtimes"],
    ["resumption", "seconds"],
    ["pruning", "distillation"],
    ["preparation", "prospect", "sweep"],
    ["run"],
    ["sweeper", "hyperparameters", "recovery"],
    ["pruner"],
    ["comparison"],
    ["cli"],
    ["__init__", "__main__"],
]
"""Rooms, a folder or a file of the package each, from the ground up: a room knows those of lower floors, and itself."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name within it; a folder's `__init__` has the name of the folder."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imports(module: str) -> tuple[set[str], set[str]]:
    """The modules of the package that a module imports, also inside functions, and the top-level packages of others."""
    path = MODULES[module]
    folder = (
        module.split(".") if path.name == "__init__.py" and module != "__init__" else module.split(".")[:-1]
    )
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*folder[: len(folder) - node.level + 1], *([node.module] if node.module else [])]
            for alias in node.names:
                longer = ".".join([*base, alias.name])
                inside.add(longer if longer in MODULES else ".".join(base) or "__init__")
        elif isinstance(node, ast.ImportFrom):
            outside.add(str(node.module).split(".")[0])
    return inside, outside - set(sys.stdlib_module_names)


def room(module: str) -> str:
    return module.split(".")[0]


FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_room_knows_only_rooms_below_it(module: str) -> None:
    assert room(module) in FLOOR, f"{room(module)} is a room that the layout does not have"
    for other in imports(module)[0]:
        if room(module) != room(other):
            lower = FLOOR[room(module)] > FLOOR[room(other)]
            assert lower, f"{module} imports {other}, which is not on a lower floor"


def test_no_module_imports_itself_by_way_of_others() -> None:
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != 1, " -> ".join((*path, module))
        if module not in state:
            state[module] = 1
            for other in imports(module)[0]:
                visit(other, (*path, module))
            state[module] = 2

    for module in MODULES:
        visit(module, ())
    assert len(state) == len(MODULES) > 40


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        (("calibration.losses", "methods.knowledge", "methods.search", "methods.least_squares"), {"torch"}),
        (("structure.families", "version", "text"), set()),
        (("modeling_kprune",), {"safetensors", "torch", "transformers"}),  # it travels alone
        (("structure.hooks", "structure.runs", "structure.units"), {"torch"}),
    ],
)
def test_numerics_and_data_know_few_libraries(names: tuple[str, ...], allowed: set[str]) -> None:
    for name in names:
        assert imports(name)[1] - {"__future__"} == allowed, name


def test_no_test_module_imports_another() -> None:
    """What several tests need is in models.py, zoo.py, data.py and checks.py; conftest.py holds fixtures and options."""
    tests = Path(__file__).parent
    alone = {"conftest", *(path.stem for path in tests.glob("test_*.py"))}
    for path in tests.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not alone & set(names), f"{path.name} imports {alone & set(names)}"
