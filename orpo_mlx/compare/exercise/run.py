"""The whole exercise: both tiers, costs, verdicts, as `results.json`; what is finished is never run again."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from orpo_mlx.compare.exercise.analysis import analyse
from orpo_mlx.compare.exercise.cells import Cells
from orpo_mlx.compare.exercise.cost import measured_steps, predicted_copies
from orpo_mlx.compare.exercise.progress import ProgressPage
from orpo_mlx.compare.exercise.sizes import EXTENTS, make_tasks
from orpo_mlx.compare.exercise.study import count_cells, run_study, size_record
from orpo_mlx.compare.exercise.verdicts import verdicts
from orpo_mlx.compare.runner import machine
from orpo_mlx.files import save_json
from orpo_mlx.models.loading import load
from orpo_mlx.models.names import DEFAULT_MODEL
from orpo_mlx.process_memory import configure_allocator
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.training.run import versions

SCHEMA = 1
RESULTS = "results.json"
TIMES = ("step_s", "reference_s")
"""Keys of a cost that differ from run to run."""
_COST_TOKENS, _COST_PAIRS, _COST_STEPS = 128, 2, 2


def run_exercise(extent_name: str, output: Path, argv: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """Run what is missing and write `output`/results.json; docs/results.md has its keys.

    Raises:
        UserError: a package, the model or the folder cannot be used.
    """
    started = time.perf_counter()
    configure_allocator()
    tasks = make_tasks(EXTENTS[extent_name])
    decisive = {name: versions()[name] for name in ("orpo-mlx", "mlx", "mlx-lm", "device")}
    tiers: dict[str, Any] = {}
    for name, make in tasks.items():
        reporter.say(f"{name}: drawing prompts and replies")
        task = make()
        page = ProgressPage(output, name, count_cells(task), reporter)
        cells = Cells(output / "cells" / name, {"size": size_record(task), "versions": decisive}, page.tell)
        study = run_study(task, cells)
        tiers[name] = {**study, "analysis": analyse(study)}
        # One line before any result: what could have been found at all.
        for variant, found in tiers[name]["analysis"]["variants"].items():
            if "detectable" in found:
                reporter.say(f"{name}, {variant}: differences in gold of {found['detectable']:.2f} would be found")
    results = {
        "schema": SCHEMA,
        "kind": "exercise",
        "extent": extent_name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "scripts/compare_methods.py", *argv]),
        "seconds": round(time.perf_counter() - started),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "tiers": tiers,
        "cost": cost(output, decisive, reporter),
    }
    results["verdicts"] = [verdict._asdict() for verdict in verdicts(results)]
    save_json(output / RESULTS, results)
    return results


def cost(output: Path, decisive: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Peaks and seconds of steps, measured here and predicted."""
    page = ProgressPage(output, "cost", 2, reporter)
    cells = Cells(output / "cells" / "cost", {"versions": decisive, "tokens": _COST_TOKENS}, page.tell)
    measured = cells.get(
        {"what": "measured"}, lambda: measured_steps(load(DEFAULT_MODEL), _COST_TOKENS, _COST_PAIRS, _COST_STEPS)
    )
    predicted = cells.get({"what": "predicted"}, lambda: {"rows": predicted_copies()})
    shape = {"model": DEFAULT_MODEL, "tokens": _COST_TOKENS, "pairs": _COST_PAIRS}
    return {**shape, "measured": measured, "predicted": predicted["rows"]}


def commit() -> str | None:
    """The commit of the checkout that this package is run from, with `+` where files differ from it."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    found = git("rev-parse", "--short=12", "HEAD")
    return None if found is None else found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def failures(results: Mapping[str, Any]) -> list[str]:
    """The sanity checks that failed, as words; none where all hold."""
    found = []
    for name, tier in results["tiers"].items():
        sanity = tier["analysis"].get("sanity", {"failed": []})
        found += [f"{name} tier, {method}" for method in sanity["failed"]]
    return found


def without_times(results: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs of one command must have in common: all but when and how long they ran, and where they were asked
    to write."""
    kept = {key: value for key, value in results.items() if key not in ("date", "seconds", "command", "commit")}
    measured = results["cost"]["measured"]
    bare = {arm: {key: value for key, value in found.items() if key not in TIMES} for arm, found in measured.items()}
    return {**kept, "cost": {**results["cost"], "measured": bare}}
