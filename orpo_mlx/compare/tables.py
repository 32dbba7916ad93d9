"""The tables of a comparison, for Markdown and HTML alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orpo_mlx.compare.chapter_claims import verdicts
from orpo_mlx.compare.results import Results
from orpo_mlx.reporting.html_page import Table, TableCell

Arm = Mapping[str, Any]
Column = Callable[[Arm], TableCell]


def number(value: float | None, form: str) -> TableCell:
    """A number in its format; a dash where there is none."""
    return TableCell("–") if value is None else TableCell(form.format(value), value)


def spread_cell(found: Mapping[str, Any] | None, form: str) -> TableCell:
    """Mean over seeds and, of several, the range."""
    if found is None:
        return number(None, form)
    shown = form.format(found["mean"])
    if found["sd"] is not None and form.format(found["low"]) != form.format(found["high"]):
        shown += f" ({form.format(found['low'])} to {form.format(found['high'])})"
    return TableCell(shown, found["mean"])


def interval_cell(found: Mapping[str, float]) -> TableCell:
    """A share with its 95 % interval."""
    return TableCell(f"{found['mean']:.1%} ({found['low']:.1%} to {found['high']:.1%})", found["mean"])


def target_cell(reached: Sequence[float | None]) -> TableCell:
    """When a target was reached, seed by seed: their mean, or by how many."""
    found = [value for value in reached if value is not None]
    if len(found) < len(reached):
        return TableCell(f"by {len(found)} of {len(reached)} seeds")
    mean = statistics.fmean(found)
    return TableCell(f"{mean:.1f}", mean)


def name_cell(arm: Arm) -> TableCell:
    """The method as it was given."""
    return TableCell(arm["name"])


def of_value(key: str, form: str) -> Column:
    """A column of one of an arm's numbers."""
    return lambda arm: number(arm[key], form)


def of_interval(key: str) -> Column:
    """A column of one of an arm's intervals."""
    return lambda arm: interval_cell(arm[key])


def of_spread(key: str, form: str) -> Column:
    """A column of one of an arm's measures over its seeds."""
    return lambda arm: spread_cell(arm["summary"].get(key), form)


def of_mean(key: str, form: str) -> Column:
    """A column of the mean over seeds alone."""
    return lambda arm: number(arm["summary"].get(key, {}).get("mean"), form)


def table_of(columns: Mapping[str, Column], arms: Sequence[Arm]) -> Table:
    """A row for each arm."""
    return Table(tuple(columns), tuple(tuple(column(arm) for column in columns.values()) for arm in arms))


def base_model(results: Results) -> Arm:
    """The model before any training, with the keys of an arm that the tables look at."""
    base = results["base"]
    known = {key: base[key] for key in ("margin", "nll", "reply_tokens", "distinct_2") if base[key] is not None}
    # Its distance to itself.
    measures = {**known, "kl_per_reply": 0.0}
    summary = {key: {"mean": value, "sd": None} for key, value in measures.items()}
    return {**base, "name": "base model", "learning_rate": None, "summary": summary}


def measure(results: Results) -> str:
    """What the share of pairs that are ranked right is called: a result that is published may say what its task is."""
    return str(results.get("measure", "accuracy"))


def quality(results: Results) -> Table:
    """What each method reached on the held-out pairs, the base model first."""
    columns = {
        "method": name_cell,
        "learning rate": of_value("learning_rate", "{:g}"),
        f"{measure(results)}, mean log-prob": of_interval("accuracy_interval"),
        f"{measure(results)}, summed log-prob": of_interval("accuracy_sum_interval"),
        "margin, nats/token": of_spread("margin", "{:.3f}"),
        "NLL of chosen, nats/token": of_spread("nll", "{:.3f}"),
        "KL to base, nats/reply": of_spread("kl_per_reply", "{:.2f}"),
        "reply, tokens": of_spread("reply_tokens", "{:.1f}"),
        "distinct-2": of_spread("distinct_2", "{:.2f}"),
    }
    return table_of(columns, [base_model(results), *results["methods"]])


def overview(results: Results) -> Table:
    """The few figures of each method that a reader in a hurry looks for, the base model first."""
    columns = {
        "": name_cell,
        f"held-out {measure(results)}, mean log-prob": of_interval("accuracy_interval"),
        "NLL of chosen, nats/token": of_mean("nll", "{:.3f}"),
        "reply, tokens": of_mean("reply_tokens", "{:.1f}"),
        "training, s": of_mean("training_s", "{:.0f}"),
        "pair tokens/s": of_mean("pair_tokens_per_s", "{:.0f}"),
        "peak memory, GiB (MLX)": of_mean("peak_memory_gib", "{:.2f}"),
    }
    return table_of(columns, [base_model(results), *results["methods"]])


def cost(results: Results) -> Table:
    """What each method's training took."""
    target = f"{results['target_accuracy']:.0%}"
    columns: dict[str, Column] = {
        "method": name_cell,
        "training, s": of_spread("training_s", "{:.1f}"),
        "of it reference, s": of_spread("reference_s", "{:.1f}"),
        "step, s (median)": of_spread("step_s_median", "{:.3f}"),
        "pair tokens/s": of_spread("pair_tokens_per_s", "{:.0f}"),
        "peak memory, GiB (MLX)": of_spread("peak_memory_gib", "{:.3f}"),
        "cache, GiB": of_spread("cache_memory_gib", "{:.3f}"),
        "process at most, GiB": of_spread("footprint_peak_gib", "{:.3f}"),
        "steps": of_spread("steps", "{:.0f}"),
        f"steps to {target}": lambda arm: target_cell(arm["to_target"]["steps"]),
        f"seconds to {target}": lambda arm: target_cell(arm["to_target"]["seconds"]),
    }
    return table_of(columns, results["methods"])


def grid(results: Results) -> Table:
    """Every setting of the sweep and the sensitivity grid with the valid accuracy it ended at."""
    columns = {
        "method": name_cell,
        "learning rate": of_value("learning_rate", "{:g}"),
        "β": of_value("beta", "{:.3g}"),
        "valid accuracy": grid_accuracy,
        "NLL of chosen, nats/token": of_value("nll", "{:.3f}"),
        "margin, nats/token": of_value("margin", "{:.3f}"),
        "chosen": lambda setting: TableCell("yes" if setting["chosen"] else ""),
    }
    settings = [
        {
            **setting,
            "name": arm["name"],
            "chosen": (setting["learning_rate"], setting["beta"])
            == (arm["learning_rate"], only_beta(arm["parameters"])),
        }
        for arm in results["methods"]
        for setting in arm["grid"]
    ]
    return table_of(columns, settings)


def grid_accuracy(setting: Mapping[str, Any]) -> TableCell:
    """The accuracy that a setting of the grid ended at, or why it did not."""
    if "failed" in setting:
        return TableCell(f"failed: {setting['failed']}")
    return number(setting["accuracy"], "{:.1%}")


def only_beta(parameters: Mapping[str, Mapping[str, float]]) -> float | None:
    """A method's β, where it has exactly one."""
    found = {values["beta"] for values in parameters.values() if "beta" in values}
    return found.pop() if len(found) == 1 else None


def sensitivity(results: Results) -> Table:
    """The range of valid accuracy over the grid, method by method."""
    columns: dict[str, Column] = {
        "method": name_cell,
        "settings": lambda arm: number(len(arm["grid"]), "{:.0f}"),
        "lowest accuracy": lambda arm: number(min(grid_accuracies(arm)), "{:.1%}"),
        "highest accuracy": lambda arm: number(max(grid_accuracies(arm)), "{:.1%}"),
        "range": lambda arm: (
            TableCell("training failed at some") if arm["sensitivity"] is None else number(arm["sensitivity"], "{:.1%}")
        ),
    }
    return table_of(columns, [arm for arm in results["methods"] if arm["grid"]])


def grid_accuracies(arm: Arm) -> list[float]:
    """The accuracies of an arm's grid, where training did not fail."""
    return [setting["accuracy"] for setting in arm["grid"] if setting["accuracy"] is not None]


def sanity(results: Results) -> Table:
    """Arms trained on wrong labels, and whether they ended where they must."""
    must = {
        "swapped": f"below the base model's {results['base']['accuracy_interval']['mean']:.1%}",
        "shuffled": "nothing: one shuffle is no null",
    }
    columns: dict[str, Column] = {
        "method": name_cell,
        "labels": lambda arm: TableCell(arm["labels"]),
        "accuracy, mean log-prob": of_interval("accuracy_interval"),
        "must be": lambda arm: TableCell(must[arm["labels"]]),
        "holds": lambda arm: TableCell({True: "yes", False: "NO", None: "–"}[arm["holds"]]),
    }
    return table_of(columns, results["sanity"])


def claims(results: Results) -> Table:
    """The course chapter's table with a verdict on each row."""
    rows = tuple(tuple(map(TableCell, row)) for row in verdicts(results))
    return Table(("the chapter says", "measured", "verdict"), rows, prose=True)


def replies(results: Results) -> Table:
    """What the base model and each method (seed 0) say to held-out prompts."""
    # A copied reference is the same maths, so it says the same.
    arms = [arm for arm in results["methods"] if not arm["copies_reference"]]
    rows = [
        (TableCell(said[0]["prompt"]), *(TableCell(f"[{reply['tokens']} tokens] {reply['text']}") for reply in said))
        for said in zip(results["base"]["replies"], *(arm["replies"] for arm in arms), strict=True)
    ]
    return Table(("prompt", "before", *(f"after {arm['name']}" for arm in arms)), tuple(rows), prose=True)
