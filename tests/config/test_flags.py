"""Messages of libraries, as a command prints them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orpo_mlx.config import flags
from orpo_mlx.config.flags import flag_of, naming_flags, with_flags
from orpo_mlx.config.settings import SETTINGS
from orpo_mlx.errors import DataError

PACKAGE = Path(flags.__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`adapter_path` a_b: holds a run; `resume` goes on", "--adapter-path a_b: holds a run; --resume goes on"),
        ("try `memory=thrift` `memory_check=False`", "try --memory thrift --no-memory-check"),
        ("give `resume=True`", "give --resume"),
        ("`nobody` and `print` stay", "`nobody` and `print` stay"),
        ("`Resume`, `resume `, ``, `", "`Resume`, `resume `, ``, `"),
    ],
)
def test_settings_in_a_message_become_flags(text: str, expected: str) -> None:
    assert with_flags(text) == expected
    assert with_flags(expected) == expected


def test_a_commands_own_flags_are_known_to_it() -> None:
    assert with_flags("`bits=3`, `seed`") == "`bits=3`, --seed"
    assert with_flags("`bits=3`, `seed`", {"bits"}) == "--bits 3, --seed"


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_called_by_its_flag(name: str) -> None:
    assert flag_of(name) == SETTINGS[name].flag


def test_an_error_keeps_its_kind_and_cause() -> None:
    with pytest.raises(DataError, match=r"^give --seed 3$") as caught, naming_flags():
        raise DataError("give `seed=3`") from KeyError("x")
    assert isinstance(caught.value.__cause__, KeyError)


def raised_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every text in the `raise` statements of a file."""
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Raise):
            for node in ast.walk(statement):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.lineno, node.value


def test_libraries_raise_without_flags() -> None:
    found = [
        f"{path}:{line}: {text}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in ("cli", "config")
        for line, text in raised_texts(path)
        if re.search(r"(^|[\s(;])--[a-z]", text)
    ]
    assert found == []
