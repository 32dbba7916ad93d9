"""Imports point downwards, so that a room can be read without those above it."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "orpo_mlx"
GROUND = (
    "__init__", "types", "errors", "text", "interrupts", "files", "folder_lock", "run_folder", "device_profile",
    "process_memory", "package_versions", "_command", "_blas", "_open_files", "_streams",
)  # fmt: skip
ROOMS = (
    "losses", "data", "reporting", "models", "engine", "judging", "config", "training", "convert", "memory", "chapter",
    "train", "rounds", "compare", "doctor", "cli", "__main__",
)  # fmt: skip
"""From the lowest to the highest; each may import those before it, and the ground."""

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in PACKAGE.rglob("*.py")
}


@cache
def imports(name: str) -> tuple[str, ...]:
    """Modules of the package that a module imports."""
    return tuple(_imports(MODULES[name]))


def _imports(tree: ast.Module) -> Iterator[str]:
    # A module that is a program too starts the command, which lies above it.
    body = [
        statement
        for statement in tree.body
        if not (isinstance(statement, ast.If) and ast.unparse(statement.test).startswith("__name__ =="))
    ]
    for node in itertools.chain.from_iterable(map(ast.walk, body)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "orpo_mlx":
            home = node.module.removeprefix("orpo_mlx").lstrip(".")
            for alias in node.names:
                inner = f"{home}.{alias.name}".lstrip(".")
                homes = (inner, f"{inner}.__init__", home, f"{home}.__init__", "__init__")
                yield next(found for found in homes if found in MODULES)


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_module_has_a_room() -> None:
    assert {room(name) for name in MODULES} == {*GROUND, *ROOMS}


def test_rooms_import_only_what_lies_below_them() -> None:
    order = {name: level for level, name in enumerate(("ground", *ROOMS))} | dict.fromkeys(GROUND, 0)
    upward = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imports(name)
        if name != "__init__" and room(other) != room(name) and order[room(other)] > order[room(name)]
    ]
    assert upward == []


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: set(imports(name)) for name in MODULES if name != "__init__"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_losses_know_nothing_but_types_and_errors() -> None:
    found = {other for name in MODULES if room(name) == "losses" for other in imports(name)}
    assert {room(other) for other in found} <= {"losses", "types", "errors"}


def test_no_module_asks_for_a_method_by_name() -> None:
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                names = [getattr(side, "attr", getattr(side, "id", "")) for side in (node.left, *node.comparators)]
                strings = [side for side in node.comparators if isinstance(getattr(side, "value", None), str)]
                assert not ("method" in names and strings), f"{name}:{node.lineno} branches on a method's name"
