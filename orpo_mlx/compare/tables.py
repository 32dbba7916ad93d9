"""The tables of a comparison, for Markdown and HTML alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orpo_mlx.compare.chapter_claims import verdicts
from orpo_mlx.reporting.html_page import Cell, Table

Results = Mapping[str, Any]


def number(value: float | None, form: str) -> Cell:
    """A number in its format; a dash where there is none."""
    return Cell("–") if value is None else Cell(form.format(value), value)


def spread_cell(found: Mapping[str, Any] | None, form: str) -> Cell:
    """Mean over seeds and, of several, the range."""
    if found is None:
        return Cell("–")
    shown = form.format(found["mean"])
    if found["sd"] is not None and form.format(found["low"]) != form.format(found["high"]):
        shown += f" ({form.format(found['low'])} to {form.format(found['high'])})"
    return Cell(shown, found["mean"])


def interval_cell(found: Mapping[str, float]) -> Cell:
    """A share with its 95 % interval."""
    return Cell(f"{found['mean']:.1%} ({found['low']:.1%} to {found['high']:.1%})", found["mean"])


def target_cell(reached: Sequence[float | None]) -> Cell:
    """When a target was reached, seed by seed: their mean, or by how many."""
    found = [value for value in reached if value is not None]
    if len(found) < len(reached):
        return Cell(f"by {len(found)} of {len(reached)} seeds")
    mean = statistics.fmean(found)
    return Cell(f"{mean:.1f}", mean)


def quality(results: Results) -> Table:
    """What each method reached on the held-out pairs, the base model first."""
    base = results["base"]
    header = (
        "method", "learning rate", "accuracy, mean log-prob", "accuracy, summed log-prob", "margin, nats/token",
        "NLL of chosen, nats/token", "KL to base, nats/reply", "reply, tokens", "distinct-2",
    )  # fmt: skip
    forms = {
        "margin": "{:.3f}", "nll": "{:.3f}", "kl_per_reply": "{:.2f}", "reply_tokens": "{:.1f}", "distinct_2": "{:.2f}"
    }  # fmt: skip
    first = (
        Cell("base model"), Cell("–"), interval_cell(base["accuracy_interval"]),
        interval_cell(base["accuracy_sum_interval"]), number(base["margin"], "{:.3f}"), number(base["nll"], "{:.3f}"),
        number(0.0, "{:.2f}"), number(base["reply_tokens"], "{:.1f}"), number(base["distinct_2"], "{:.2f}"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = [first]
    for arm in results["methods"]:
        rows.append(
            (
                Cell(arm["name"]), number(arm["learning_rate"], "{:g}"), interval_cell(arm["accuracy_interval"]),
                interval_cell(arm["accuracy_sum_interval"]),
                *(spread_cell(arm["summary"].get(key), form) for key, form in forms.items()),
            )
        )  # fmt: skip
    return Table(header, tuple(rows))


def overview(results: Results) -> Table:
    """The few figures of each method that a reader in a hurry looks for, the base model first."""
    base = results["base"]
    header = (
        "", "held-out accuracy, mean log-prob", "NLL of chosen, nats/token", "reply, tokens", "training, s",
        "pair tokens/s", "peak memory, GiB (MLX)",
    )  # fmt: skip
    first = (
        Cell("base model"), interval_cell(base["accuracy_interval"]), number(base["nll"], "{:.3f}"),
        number(base["reply_tokens"], "{:.1f}"), *(Cell("–") for _ in range(3)),
    )  # fmt: skip
    forms = {
        "nll": "{:.3f}", "reply_tokens": "{:.1f}", "training_s": "{:.0f}", "pair_tokens_per_s": "{:.0f}",
        "peak_memory_gib": "{:.2f}",
    }  # fmt: skip
    rows = [
        (
            Cell(arm["name"]), interval_cell(arm["accuracy_interval"]),
            *(number(arm["summary"][key]["mean"], form) for key, form in forms.items()),
        )
        for arm in results["methods"]
    ]  # fmt: skip
    return Table(header, (first, *rows))


def cost(results: Results) -> Table:
    """What each method's training took."""
    columns: dict[str, Callable[[Mapping[str, Any]], Cell]] = {
        "method": lambda arm: Cell(arm["name"]),
        "training, s": _of("training_s", "{:.1f}"),
        "of it reference, s": _of("reference_s", "{:.1f}"),
        "step, s (median)": _of("step_s_median", "{:.3f}"),
        "pair tokens/s": _of("pair_tokens_per_s", "{:.0f}"),
        "peak memory, GiB (MLX)": _of("peak_memory_gib", "{:.3f}"),
        "cache, GiB": _of("cache_memory_gib", "{:.3f}"),
        "process at most, GiB": _of("footprint_peak_gib", "{:.3f}"),
        "steps": _of("steps", "{:.0f}"),
        f"steps to {results['target_accuracy']:.0%}": lambda arm: target_cell(arm["to_target"]["steps"]),
        f"seconds to {results['target_accuracy']:.0%}": lambda arm: target_cell(arm["to_target"]["seconds"]),
    }
    rows = tuple(tuple(column(arm) for column in columns.values()) for arm in results["methods"])
    return Table(tuple(columns), rows)


def grid(results: Results) -> Table:
    """Every setting of the sweep and the sensitivity grid with the valid accuracy it ended at."""
    header = (
        "method",
        "learning rate",
        "β",
        "valid accuracy",
        "NLL of chosen, nats/token",
        "margin, nats/token",
        "chosen",
    )
    rows = []
    for arm in results["methods"]:
        own = _beta(arm["parameters"])
        for found in arm["grid"]:
            chosen = found["learning_rate"] == arm["learning_rate"] and found["beta"] == own
            accuracy = Cell(f"failed: {found['failed']}") if "failed" in found else number(found["accuracy"], "{:.1%}")
            rows.append(
                (
                    Cell(arm["name"]), number(found["learning_rate"], "{:g}"), number(found["beta"], "{:.3g}"),
                    accuracy, number(found["nll"], "{:.3f}"), number(found["margin"], "{:.3f}"),
                    Cell("yes" if chosen else ""),
                )
            )  # fmt: skip
    return Table(header, tuple(rows))


def sensitivity(results: Results) -> Table:
    """The range of valid accuracy over the grid, method by method."""
    header = ("method", "settings", "lowest accuracy", "highest accuracy", "range")
    rows = []
    for arm in results["methods"]:
        if arm["grid"]:
            found = [each["accuracy"] for each in arm["grid"] if each["accuracy"] is not None]
            rows.append(
                (
                    Cell(arm["name"]), number(len(arm["grid"]), "{:.0f}"), number(min(found), "{:.1%}"),
                    number(max(found), "{:.1%}"),
                    Cell("training failed at some") if arm["sensitivity"] is None
                    else number(arm["sensitivity"], "{:.1%}"),
                )
            )  # fmt: skip
    return Table(header, tuple(rows))


def sanity(results: Results) -> Table:
    """Arms trained on wrong labels, and whether they ended where they must."""
    header = ("method", "labels", "accuracy, mean log-prob", "must be", "holds")
    base = results["base"]["accuracy_interval"]
    must = {
        "swapped": f"below the base model's {base['mean']:.1%}",
        "shuffled": f"within the base model's {base['low']:.1%} to {base['high']:.1%}",
    }
    rows = [
        (
            Cell(arm["name"]), Cell(arm["labels"]), interval_cell(arm["accuracy_interval"]), Cell(must[arm["labels"]]),
            Cell("yes" if arm["holds"] else "NO"),
        )
        for arm in results["sanity"]
    ]  # fmt: skip
    return Table(header, tuple(rows))


def claims(results: Results) -> Table:
    """The course chapter's table with a verdict on each row."""
    rows = tuple(tuple(map(Cell, row)) for row in verdicts(results))
    return Table(("the chapter says", "measured", "verdict"), rows, prose=True)


def replies(results: Results) -> Table:
    """What the base model and each method (seed 0) say to held-out prompts."""
    names = [arm["name"] for arm in results["methods"] if not arm["copies_reference"]]
    answers: list[Sequence[Mapping[str, Any]]] = [results["base"]["replies"]]
    answers += [arm["replies"] for arm in results["methods"] if not arm["copies_reference"]]
    rows = []
    for said in zip(*answers, strict=True):
        rows.append((Cell(said[0]["prompt"]), *(Cell(f"[{reply['tokens']} tokens] {reply['text']}") for reply in said)))
    return Table(("prompt", "before", *(f"after {name}" for name in names)), tuple(rows), prose=True)


def _of(key: str, form: str) -> Callable[[Mapping[str, Any]], Cell]:
    return lambda arm: spread_cell(arm["summary"].get(key), form)


def _beta(parameters: Mapping[str, Mapping[str, float]]) -> float | None:
    found = {values["beta"] for values in parameters.values() if "beta" in values}
    return found.pop() if len(found) == 1 else None
