"""Tables of the published results of comparisons and of the exercise, by the names that markers give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orpo_mlx.compare import tables
from orpo_mlx.compare.exercise import page as exercise
from orpo_mlx.compare.exercise import tables as exercise_tables
from orpo_mlx.compare.report import facts
from orpo_mlx.reporting.html_page import Table, markdown_text

MISSING = "Not measured yet."


def _facts(results: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {markdown_text(value)}" for key, value in facts(results).items())


def _taken(results: Mapping[str, Any]) -> str:
    """One sentence on how and where the figures were taken."""
    machine, versions = results["machine"], results["versions"]
    device = machine.get("device_name") or machine["platform"]
    kept = ", ".join(f"{name} {versions[name]}" for name in ("orpo-mlx", "mlx", "mlx-lm", "python"))
    pairs = results["settings"]["batch_size"] * results["settings"]["grad_accumulation_steps"]
    return (
        f"Means over {results['seeds']} seeds, {results['budget']['words']} of {pairs} pairs each; in brackets, 95 % "
        f"intervals. Taken {results['date'][:10]} on {machine['cores']} cores of {device} "
        f"({machine['platform']}), {kept}, by `{results['command']}`."
    )


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "facts": _facts,
    "taken": _taken,
    "overview": lambda results: tables.overview(results).markdown(),
    "claims": lambda results: tables.claims(results).markdown(),
    "quality": lambda results: tables.quality(results).markdown(),
    "cost": lambda results: tables.cost(results).markdown(),
    "sensitivity": lambda results: tables.sensitivity(results).markdown(),
    "grid": lambda results: tables.grid(results).markdown(),
    "sanity": lambda results: tables.sanity(results).markdown(),
    "replies": lambda results: tables.replies(results).markdown(),
}
"""What may stand after a comparison's name in a marker."""


def _exercise_facts(results: Mapping[str, Any]) -> str:
    found = {"sanity": exercise.first_line(results), **exercise.facts(results)}
    return "\n".join(f"- {key}: {markdown_text(value)}" for key, value in found.items())


def _exercise_taken(results: Mapping[str, Any]) -> str:
    """One sentence on how and where the figures were taken."""
    size = next(iter(results["tiers"].values()))["size"]
    machine, versions = results["machine"], results["versions"]
    kept = ", ".join(f"{name} {versions[name]}" for name in ("orpo-mlx", "mlx", "mlx-lm", "python"))
    return (
        f"{size['seeds']} seeds, {size['test_prompts'] * size['samples']} replies each; standard errors in brackets. "
        f"Taken {results['date'][:10]} on {machine['cores']} cores of "
        f"{machine.get('device_name') or machine['platform']}, commit {results['commit']}, {kept}, "
        f"by `{results['command']}`."
    )


def _exercise_quality(results: Mapping[str, Any]) -> str:
    """Every tier and variant, a table each."""
    return "\n\n".join(
        f"{tier} tier, {variant}:\n\n{exercise_tables.quality(results, tier, variant).markdown()}"
        for tier, found in results["tiers"].items()
        for variant in found["variants"]
    )


def _exercise_equal_kl(results: Mapping[str, Any]) -> str:
    """As `_exercise_quality`, of those where it was measured."""
    made = {
        f"{tier} tier, {variant}": exercise_tables.equal_kl(results, tier, variant)
        for tier, found in results["tiers"].items()
        for variant in found["variants"]
    }
    return "\n\n".join(f"{name}:\n\n{table.markdown()}" for name, table in made.items() if table.rows)


def _by_tier(made: Callable[[Mapping[str, Any], str], Table]) -> Callable[[Mapping[str, Any]], str]:
    """A table for each tier that has it."""
    return lambda results: "\n\n".join(
        table.markdown() for table in (made(results, tier) for tier in results["tiers"]) if table.rows
    )


EXERCISE_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "facts": _exercise_facts,
    "taken": _exercise_taken,
    "power": lambda results: exercise_tables.power(results).markdown(),
    "quality": _exercise_quality,
    "equal_kl": _exercise_equal_kl,
    "gains": _by_tier(exercise_tables.gains),
    "courses": _by_tier(exercise_tables.courses),
    "controls": lambda results: exercise_tables.controls(results).markdown(),
    "lengths": lambda results: exercise_tables.lengths(results).markdown(),
    "lengths_at_kl": lambda results: exercise_tables.lengths_at_kl(results).markdown(),
}
"""What may stand after the name of results of the exercise, or of one tier of it."""
EXACT_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "overview": lambda results: exercise_tables.overview(results).markdown(),
    "claims": lambda results: exercise_tables.claims(results).markdown(),
    "verdicts": lambda results: exercise_tables.claims(results, short=True).markdown(),
    "sanity": lambda results: exercise_tables.sanity(results).markdown(),
    "costs": lambda results: exercise_tables.costs(results).markdown(),
    "peaks": lambda results: exercise_tables.peaks(results).markdown() if results["cost"].get("peaks") else MISSING,
    "copies": lambda results: exercise_tables.copies(results).markdown(),
}
"""What may stand there besides where the exact tier was run, to which claims and costs belong."""


def tables_for(results: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    """The tables that can be made of some results."""
    if results.get("kind") != "exercise":
        return TABLES
    return {**EXERCISE_TABLES, **EXACT_TABLES} if "exact" in results["tiers"] else EXERCISE_TABLES
