"""Every flag of every command is read by the code, and every --help can be taken in."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

from orpo_mlx.cli.main import COMMANDS, main
from orpo_mlx.compare.plan import BUDGETS
from orpo_mlx.config import settings as config_module
from orpo_mlx.config.command_line import LORA_FLAGS
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.losses.recipe import PARAMETERS

PACKAGE = Path(config_module.__file__).parent.parent
SETTINGS = {field.name for field in dataclasses.fields(TrainingConfig)}
_SCREEN = 40

# Where a command's parser is, if not in its own module.
PARSERS = {"train": "orpo_mlx.config.command_line"}
# Read by getattr over these names.
BY_NAME = {*PARAMETERS, *BUDGETS, *LORA_FLAGS}
# Where settings are declared, checked and taken from a user, which is no use of them; and what these modules make of
# them for the others to read: other settings, or a method's parameters.
DECLARING = [
    PACKAGE / "config" / name
    for name in ("settings.py", "derived.py", "checks.py", "reference_checks.py", "command_line.py", "print_config.py")
]
_TRANSLATED = ("memory_mode", "data_reading", "recipe", "given_settings")


def parser_of(name: str) -> argparse.ArgumentParser:
    module = importlib.import_module(PARSERS.get(name, COMMANDS[name].module))
    parser: argparse.ArgumentParser = module.build_parser()
    return parser


def with_subcommands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    inner = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(sub for parsers in inner for sub in parsers)]


def attributes(tree: ast.AST, holders: tuple[str, ...]) -> set[str]:
    """Names read as attributes of something that is called one of `holders`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and ast.unparse(node.value).split(".")[-1] in holders
    }


def test_every_setting_of_a_run_is_read_outside_its_declaration() -> None:
    holders = ("config", "own", "changed", "settings", "_config")
    found = set(BY_NAME)
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path not in DECLARING:
            found |= attributes(tree, holders)
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in _TRANSLATED:
                found |= attributes(node, holders)
    assert sorted(SETTINGS - found) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_read(name: str) -> None:
    home = importlib.import_module(PARSERS.get(name, COMMANDS[name].module))
    assert home.__file__ is not None
    # What several commands have is read in a module that they share.
    homes = (Path(home.__file__), PACKAGE / "cli" / "common" / "judging.py")
    found = set().union(*(attributes(ast.parse(path.read_text(encoding="utf-8")), ("args", "own")) for path in homes))
    for parser in with_subcommands(parser_of(name)):
        flags = {
            action.dest
            for action in parser._actions
            if action.dest not in (argparse.SUPPRESS, "help", "list_methods", "command")
        }
        read = found | BY_NAME | SETTINGS
        assert sorted(flags - read) == [], parser.prog


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train -c a --config b", "--config: is given twice, expected one file; put the settings into one"),
        ("fit -c a -c b", "--config: is given twice"),
        ("iterate -c a -c b --output o", "--config: is given twice"),
        ("compare --quick --full --output o", "argument --full: not allowed with argument --quick"),
    ],
)
def test_what_can_be_given_once_is_not_taken_from_the_last(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_or_has_groups(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ")
    for parser in with_subcommands(parser_of(name)):
        text = parser.format_help()
        groups = [group for group in parser._action_groups[2:] if group._group_actions]
        assert len(text.splitlines()) <= _SCREEN or len(groups) >= 3, parser.prog
        flags = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
        assert all(action.help for action in flags), parser.prog
