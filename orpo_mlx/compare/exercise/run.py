"""The whole exercise: both tiers, costs, verdicts, as `results.json`; what is finished is never run again."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from orpo_mlx.compare.exercise.analysis import analyse
from orpo_mlx.compare.exercise.cells import Cells, until_done
from orpo_mlx.compare.exercise.cost import measured_peaks, measured_steps, predicted_copies
from orpo_mlx.compare.exercise.helpers import helped
from orpo_mlx.compare.exercise.progress import ProgressPage
from orpo_mlx.compare.exercise.significance import rounded
from orpo_mlx.compare.exercise.sizes import COST_SHAPES, EXTENTS, CostShapes, Part, part_of, tiers_of
from orpo_mlx.compare.exercise.study import count_cells, run_study, size_record
from orpo_mlx.compare.exercise.task import Tier
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
# What no training depends on: methods, seeds, settings can be added to what is there.
_MAY_GROW = ("rates", "rounds", "seeds", "shuffles", "variants", "contenders")
_COST_TOKENS, _COST_PAIRS, _COST_STEPS = 128, 2, 2
EVERYTHING = Part()


def run_exercise(
    extent_name: str,
    output: Path,
    argv: Sequence[str],
    reporter: Reporter,
    part: Part = EVERYTHING,
    processes: int = 1,
) -> dict[str, Any]:
    """Run what is missing and write `output`/results.json; docs/results.md has its keys.

    Costs and the claims are the first tier's: without it there are none. Several `processes` share the trainings, and
    give the results that one gives, on a CPU but for rounding.

    Raises:
        UserError: a package, the model or the folder cannot be used.
    """
    started = time.perf_counter()
    configure_allocator()
    asked = tiers_of(part_of(EXTENTS[extent_name], part), part.tier)
    decisive = {name: versions()[name] for name in ("orpo-mlx", "mlx", "mlx-lm", "device")}
    tiers: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for name, tier in run_tiers(asked, output, decisive, reporter, processes):
        tiers[name] = tier
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
            "unfinished": unfinished(asked, tiers),
            "tiers": tiers,
        }
        # Seconds of steps are not measured while helpers train.
        if "exact" in tiers and not unfinished([], {"exact": tiers["exact"]}):
            results["cost"] = cost(output, decisive, COST_SHAPES[extent_name], reporter)
            results["verdicts"] = rounded([verdict._asdict() for verdict in verdicts(results)])
        # After each variant: those of the second tier may take a night each.
        save_json(output / RESULTS, results)
    return results


def run_tiers(
    asked: Mapping[str, Tier],
    output: Path,
    decisive: Mapping[str, Any],
    reporter: Reporter,
    processes: int,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each tier by name, with its analysis, as it is after each of its variants; and a line of what that could find."""
    for name, tier in asked.items():
        page = ProgressPage(output, name, count_cells(tier.size), reporter, processes)
        record = size_record(tier.size, tier.bound)
        common = {key: value for key, value in record.items() if key not in _MAY_GROW}
        folder = output / "cells" / name
        cells = Cells(folder, {**common, "versions": decisive}, page.tell)
        reporter.say("Drawing prompts and replies")
        helping = helped(folder, name, tier.size, processes, reporter) if processes > 1 else nullcontext()
        with helping as helpers:
            if helpers is not None:
                cells.left_to_others = helpers.at_work
            task = tier.make(cells)
            for study in run_study(task, cells):
                analysis = analyse(study)
                variant, found = list(analysis["variants"].items())[-1]
                if "detectable" in found:
                    least, most = (found["detectable"][key] for key in ("least", "most"))
                    reporter.say(f"{name}, {variant}: differences in gold of {least:.3f} to {most:.3f} would be found")
                yield name, {**study, "analysis": analysis}


def unfinished(asked: Iterable[str], tiers: Mapping[str, Any]) -> list[str]:
    """Variants of tiers, and tiers, that are still to come."""
    begun = [
        f"{name}, {each}" for name, tier in tiers.items() for each in tier["size"]["variants"][len(tier["variants"]) :]
    ]
    return [*begun, *(name for name in asked if name not in tiers)]


def cost(output: Path, decisive: Mapping[str, Any], shapes: CostShapes, reporter: Reporter) -> dict[str, Any]:
    """Peaks and seconds of steps, measured here and predicted."""
    page = ProgressPage(output, "cost", 3, reporter)
    cells = Cells(output / "cells" / "cost", {"versions": decisive, "tokens": _COST_TOKENS}, page.tell)

    def steps() -> Mapping[str, Any]:
        return measured_steps(load(DEFAULT_MODEL), _COST_TOKENS, _COST_PAIRS, _COST_STEPS)

    wanted: list[tuple[Mapping[str, Any], Callable[[], Mapping[str, Any]]]] = [
        ({"what": "measured"}, steps),
        ({"what": "peaks", "shapes": shapes.peaks}, lambda: {"rows": measured_peaks(shapes.peaks)}),
        (
            {"what": "predicted", "small": shapes.small, "large": shapes.large},
            lambda: {"rows": predicted_copies(shapes.small, shapes.large)},
        ),
    ]
    measured, peaks, predicted = until_done([partial(cells.get, *each) for each in wanted])
    shape = {"model": DEFAULT_MODEL, "tokens": _COST_TOKENS, "pairs": _COST_PAIRS}
    return {**shape, "measured": measured, "peaks": peaks["rows"], "predicted": predicted["rows"]}


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
