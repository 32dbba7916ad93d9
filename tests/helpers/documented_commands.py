"""The commands in README.md and docs/, and what they mean."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from orpo_mlx.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SCRIPTS = {"convert.py": "convert", "compare_methods.py": "compare", "compare_memory.py": "memory"}
_MODULES = {command.module: name for name, command in COMMANDS.items()} | {"orpo_mlx.train": "train"}
_PYTHON = re.compile(r"(\.venv/bin/)?python")
_SCRIPT = re.compile(r"(\.venv/bin/)?orpo-mlx")


class Line(NamedTuple):
    """One command of a document."""

    document: str
    words: list[str]

    def ours(self) -> tuple[str, list[str]] | None:
        """The command of `orpo-mlx` that it is, and its arguments; None where it is another program."""
        words = self.words
        if words[0] == "mlx.launch":
            words = words[next(i for i, word in enumerate(words) if _PYTHON.fullmatch(word)) :]
        if _SCRIPT.fullmatch(words[0]):
            return words[1], words[2:]
        if not _PYTHON.fullmatch(words[0]):
            return None
        if words[1] == "-m" and words[2] in _MODULES:
            return _MODULES[words[2]], words[3:]
        script = Path(words[1])
        return (SCRIPTS[script.name], words[2:]) if script.parent.name == "scripts" else None


def lines_of(path: Path) -> list[Line]:
    """Every command in the `sh` blocks of a document, those of one line apart."""
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    parts = [part for block in blocks for line in block.splitlines() if line for part in line.split("&&")]
    return [Line(path.name, shlex.split(part)) for part in parts]


LINES = [line for path in DOCUMENTS for line in lines_of(path)]
