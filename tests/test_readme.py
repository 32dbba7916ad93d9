"""What the README says exists, and its commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from orpo_mlx.chat import build_parser as build_chat_parser
from orpo_mlx.compare_plan import parse as parse_comparison
from orpo_mlx.config import resolve
from orpo_mlx.convert import build_parser as build_convert_parser
from orpo_mlx.fit import parse as parse_fit
from orpo_mlx.memory_benchmark import parse as parse_benchmark
from orpo_mlx.methods import METHODS
from orpo_mlx.push import build_parser as build_push_parser
from orpo_mlx.report import build_parser as build_report_parser
from orpo_mlx.score import build_parser as build_score_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = README + "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines() if line]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_files_and_flags_that_exist(command: str) -> None:
    for part in command.split("&&"):
        words = shlex.split(part)
        if words[:2] == ["pip", "install"]:
            continue
        if words[0] == "mlx.launch":
            words = words[words.index(".venv/bin/python") :]
        if words[0].startswith("scripts/"):
            assert (ROOT / words[0]).is_file()
            assert all(flag in (ROOT / words[0]).read_text() for flag in words[1:])
        elif words[1] == "scripts/compare_memory.py":
            parse_benchmark(words[2:])
        elif words[1] == "scripts/convert.py":
            build_convert_parser().parse_args(words[2:])
        elif words[1] == "scripts/compare_methods.py":
            parse_comparison(words[2:])
        elif words[1:3] == ["-m", "orpo_mlx.train"]:
            resolve([word for word in words[3:] if word not in ("-c", "run.yaml")])
        elif words[1:3] == ["-m", "orpo_mlx.fit"]:
            parse_fit(words[3:])
        elif words[1:3] == ["-m", "orpo_mlx.score"]:
            build_score_parser().parse_args(words[3:])
        elif words[1:3] == ["-m", "orpo_mlx.report"]:
            build_report_parser().parse_args(words[3:])
        elif words[1:3] == ["-m", "orpo_mlx.chat"]:
            build_chat_parser().parse_args(words[3:])
        elif words[1:3] == ["-m", "orpo_mlx.push"]:
            build_push_parser().parse_args(words[3:])
        else:
            assert words[1] == "-m"
            assert words[2] in ("pytest", "mlx_lm")


def test_every_module_is_in_the_table() -> None:
    for path in (ROOT / "orpo_mlx").glob("[a-z]*.py"):
        assert f"`{path.name}`" in README or path.name == "errors.py", path.name


def test_the_table_of_methods_is_the_registry() -> None:
    for name, method in METHODS.items():
        equation, reference = method.equation.replace("|", r"\|"), "yes" if method.needs_reference else "no"
        assert f"| `{name}` | {equation} | {reference} | {method.source} |" in README
