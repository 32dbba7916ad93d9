"""A comparison that tests can look at, its cells run within this process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_mlx.cli.compare import parse_plan
from orpo_mlx.compare import runner
from orpo_mlx.compare.cell import run_cell
from orpo_mlx.compare.report import write_comparison
from orpo_mlx.reporting.console import Reporter
from tests.conftest import write_rows

ODD = (
    "Who is <script>alert({})</script>?",
    "Say \x1b[31mred\x1b[0m and | a pipe {}",
    "A plain question {}\nin two lines",
)
METHODS = "orpo,dpo,dpo --reference copy"


def text_rows(count: int, first: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(first, first + count):
        question = ODD[number % len(ODD)].format(number)
        sides = {"chosen": f"It is {number}.", "rejected": f"Well, <b>maybe</b> {7 * number}, or so they say."}
        turns = {side: [{"role": "assistant", "content": said}] for side, said in sides.items()}
        rows.append({"prompt": [{"role": "user", "content": question}], **turns})
    return rows


def write_text_data(folder: Path) -> Path:
    for split, count, first in (("train", 12, 0), ("valid", 4, 100), ("test", 6, 200)):
        write_rows(folder / f"{split}.jsonl", text_rows(count, first))
    return folder


def words(folder: Path, model: Path, data: Path, *more: str) -> list[str]:
    shared = ("--batch-size", "2", "--learning-rates", "1e-3,1e-2", "--steps", "3")
    return ["--model", str(model), "--data", str(data), "--output", str(folder), *shared, *more]


def here(spec: dict[str, Any], title: str, progress: Any) -> None:
    """What stands in for a process of its own."""
    # Tiny models babble to the limit.
    run_cell({**spec, "argv": [*spec["argv"], "--sample-tokens", "6"]}, progress)


def quiet() -> Reporter:
    return Reporter(Console(file=io.StringIO(), highlight=False))


def run_comparison(folder: Path, model: Path) -> Path:
    argv = words(folder / "out", model, write_text_data(folder / "data"), "--methods", METHODS, "--seeds", "2")
    argv += ["--beta-factors", "0.5,1", "--sanity", "orpo", "--learning-rates", "1e-2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORPO_MLX_CACHE", "off")
        patch.setattr(runner, "in_a_process", here)
        results = runner.run_comparison(parse_plan(argv), argv, quiet())
    write_comparison(results, folder / "out")
    return folder / "out"
