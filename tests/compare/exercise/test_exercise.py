"""The exercise from end to end on its exact tier: resumable, the same twice, recomputed by another script."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_mlx.cli import compare as command
from orpo_mlx.compare.exercise import run as exercise
from orpo_mlx.compare.exercise import sizes, study
from orpo_mlx.compare.exercise.analysis import analyse
from orpo_mlx.compare.exercise.gold_task import GoldTask
from orpo_mlx.compare.exercise.halving import Round
from orpo_mlx.compare.exercise.page import first_line, html, markdown
from orpo_mlx.errors import ConfigError, DataError, TrainingError
from orpo_mlx.reporting.console import Reporter
from scripts.check_comparison import check, differing, read

TINY = sizes.QUICK_EXACT._replace(
    pairs=64,
    batch_size=16,
    rounds=(Round(4, 2), Round(1, 3)),
    looks=2,
    seeds=2,
    valid_prompts=8,
    test_prompts=6,
    samples=2,
    held_out=40,
    contenders=("orpo", "dpo", "sft", "chapter's step"),
    variants=("0 % flipped", "20 % flipped"),
)
COST = {"steps": 2, "forward_tokens": 512, "peak_gib": 1.25, "step_s": 0.5, "reference_s": 0.1}


@pytest.fixture(scope="module")
def tiny() -> Iterator[pytest.MonkeyPatch]:
    """The exercise with its exact tier alone, and costs that are not measured: they need the real model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exercise, "make_tasks", lambda extent: {"exact": lambda: GoldTask(TINY)})
        patch.setattr(exercise, "load", lambda name: None)
        arms = ("orpo", "dpo", "dpo --reference copy")
        patch.setattr(exercise, "measured_steps", lambda *shape: {name: dict(COST) for name in arms})
        row = {"model": "m", "memory": "fast", "tokens": 8, "weights_gib": 1.0, "peak_gib": 2.0, "copy_ratio": 1.5}
        patch.setattr(exercise, "predicted_copies", lambda: [row])
        yield patch


def quiet() -> Reporter:
    return Reporter(Console(file=io.StringIO(), highlight=False))


@pytest.fixture(scope="module")
def results(tiny: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exercise")
    exercise.run_exercise("quick", folder, ["--quick", "--output", "out"], quiet())
    return folder / "results.json"


def test_every_figure_is_recomputed_by_another_script(results: Path) -> None:
    found = read(results)
    count, wrong = check(found)
    assert wrong == []
    assert count > 100
    spoiled = copy.deepcopy(found)
    spoiled["tiers"]["exact"]["analysis"]["variants"]["20 % flipped"]["methods"]["orpo"]["gold"]["mean"] += 0.001
    assert len(check(spoiled)[1]) == 1
    with pytest.raises(DataError, match="cannot be read"):
        read(results.parent / "progress.html")


def test_what_was_done_is_not_done_again_and_a_second_run_is_the_same(
    results: Path, tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = read(results)
    cells = results.parent / "cells" / "exact"
    trained: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train", lambda *a: trained.append("again"))
        exercise.run_exercise("quick", results.parent, [], quiet())
    assert trained == []
    assert list(differing(first, read(results))) == []
    # Interrupted: some cells are gone, one was cut off while it was written.
    files = sorted(cells.glob("*.json"))
    for file in files[::4]:
        if file.name != "exercise.json":
            file.unlink()
    files[1].write_text(files[1].read_text()[:50])
    exercise.run_exercise("quick", results.parent, [], quiet())
    assert list(differing(first, read(results))) == []
    assert len(sorted(cells.glob("*.json"))) == len(files)


def test_cells_of_another_exercise_are_not_taken(results: Path, tiny: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exercise, "make_tasks", lambda extent: {"exact": lambda: GoldTask(TINY._replace(pairs=48))})
        with pytest.raises(ConfigError, match="another exercise"):
            exercise.run_exercise("quick", results.parent, [], quiet())


def test_a_failed_sanity_check_fails_the_command_and_stands_on_the_first_line(
    results: Path, tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = read(results)
    raw = found["tiers"]["exact"]
    # As if the shuffled labels had been learned from: by much the same under every shuffle.
    for number, wins in enumerate(raw["sanity"][1]["wins"].values()):
        wins[:] = [1] * (len(wins) - 2 - number) + [0] * (2 + number)
    raw["analysis"] = analyse(raw)
    assert raw["analysis"]["sanity"]["failed"] == ["dpo"]
    assert markdown(found).startswith("A SANITY CHECK FAILED (exact tier, dpo)")
    assert first_line(found) in html(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exercise, "run_exercise", lambda *a: found)
        with pytest.raises(TrainingError, match="sanity check failed"):
            command.run(["--quick", "--output", str(tmp_path)])
    assert (tmp_path / "report.md").read_text().startswith("A SANITY CHECK FAILED")


def test_the_page_has_the_power_before_the_results(results: Path) -> None:
    text = markdown(read(results))
    assert text.index("What the design could find") < text.index("The chapter's claims") < text.index("exact tier")
    assert "chapter's step" in text


def test_what_differs_is_named(results: Path) -> None:
    found: dict[str, Any] = read(results)
    other = json.loads(json.dumps(found))
    other["date"], other["cost"]["measured"]["dpo"]["step_s"] = "tomorrow", 9.0
    assert list(differing(found, other)) == []
    other["verdicts"][0]["verdict"] = "?"
    assert list(differing(found, other)) == ["/verdicts/0/verdict"]


@pytest.mark.parametrize("words", [["--steps", "3"], ["--methods", "orpo"], ["--batch-size", "2"]])
def test_the_exercise_sets_everything_itself(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="give --output alone"):
        command.parse_request(["--quick", "--output", "x", *words])
