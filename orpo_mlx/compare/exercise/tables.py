"""The tables of the exercise, for Markdown and HTML alike."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from orpo_mlx.compare.exercise.contenders import SAME_LOSS
from orpo_mlx.compare.tables import number
from orpo_mlx.reporting.html_page import Table, TableCell

Results = Mapping[str, Any]

_MEASURES = {
    "gold": "gold",
    "kl": "KL to base, nats/reply",
    "win": "wins over base",
    "tokens": "reply, tokens",
    "entropy": "entropy, nats/token",
    "chosen_drift": "log-prob of chosen, change",
    "rejected_drift": "of rejected, change",
    "text_nll": "NLL of a text, nats/token",
}
_FORMS = {"gold": "{:.3f}", "text_nll": "{:.3f}"}


def mean_cell(found: Mapping[str, float] | None, form: str) -> TableCell:
    """A mean with its standard error."""
    if found is None:
        return number(None, form)
    shown = form.format(found["mean"])
    if found["standard_error"]:
        shown += f" ({form.format(found['standard_error'])})"
    return TableCell(shown, found["mean"])


def quality(results: Results, tier: str, variant: str) -> Table:
    """What each method reached on a variant, the base model first."""
    analysis = results["tiers"][tier]["analysis"]
    methods = analysis["variants"][variant]["methods"]
    differences = analysis["variants"][variant].get("differences", {})
    raw = results["tiers"][tier]["variants"][variant]
    keys = [key for key in _MEASURES if key in next(iter(methods.values()))]
    # The number of steps is part of a setting where it was tuned for all seeds at once.
    settings = (
        ("rate", "strength", "step") if results["tiers"][tier]["size"].get("fixed_steps") else ("rate", "strength")
    )
    names = {"strength": "β", "step": "steps"}
    header = (
        "method",
        *(names.get(each, each) for each in settings),
        *(_MEASURES[key] for key in keys),
        "gold minus DPO's",
        "p",
    )
    rows = [_row("base model", dict.fromkeys(settings), keys, analysis["base"], None)]
    for name, found in methods.items():
        chosen = {each: raw[name]["chosen"][each] for each in settings}
        rows.append(_row(name, chosen, keys, found, differences.get(name)))
    return Table(header, tuple(rows))


def _row(
    name: str, chosen: Mapping[str, Any], keys: list[str], found: Mapping[str, Any], gap: Mapping[str, Any] | None
) -> tuple[TableCell, ...]:
    cells = [mean_cell(found.get(key), _FORMS.get(key, "{:.2f}")) for key in keys]
    setting = (number(value, "{:g}") for value in chosen.values())
    return (TableCell(name), *setting, *cells, gap_cell(gap), number(None if gap is None else gap["p_holm"], "{:.4f}"))


def power(results: Results) -> Table:
    """What each tier and variant could have found."""
    rows = []
    for name, tier in results["tiers"].items():
        size = tier["size"]
        for variant, found in tier["analysis"]["variants"].items():
            budget = " then ".join(_round(**each) for each in size["rounds"])
            rows.append(
                (
                    TableCell(name),
                    TableCell(variant),
                    TableCell(_range(found.get("detectable"))),
                    number(size["seeds"], "{:.0f}"),
                    number(size["test_prompts"] * size["samples"], "{:.0f}"),
                    number(size["kl_bound"], "{:g}"),
                    TableCell(f"{budget}; {size['batch_size']} pairs a step"),
                )
            )
    header = ("tier", "variant", "detectable", "seeds", "test replies", "KL bound", "tuning of every method")
    return Table(header, tuple(rows))


def _range(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{found['median']:.3f} ({found['least']:.3f} to {found['most']:.3f})"


def equal_kl(results: Results, tier: str, variant: str) -> Table:
    """Each method where its KL to the base was as much as the others'; without rows where that was not measured."""
    found = results["tiers"][tier]["analysis"]["variants"][variant]["at_kl"]
    header, rows = ["method"], [[TableCell(name)] for name in results["tiers"][tier]["variants"][variant]]
    for target, at in found.items():
        header += [f"gold at KL {target}", "step", "minus DPO's", "would be found", "p"]
        for row in rows:
            row += _cells_at_kl(row[0].text, at, results["tiers"][tier]["size"]["seeds"])
    return Table(tuple(header), tuple(map(tuple, rows)) if found else ())


def _cells_at_kl(name: str, at: Mapping[str, Any], seeds: int) -> list[TableCell]:
    own, gap = at["methods"].get(name), at.get("differences", {}).get(name)
    if own is None:
        return [TableCell(f"reached by {at['reached'][name]} of {seeds}"), *(TableCell("–") for _ in range(4))]
    least, p = (
        number(None if gap is None else gap[key], form)
        for key, form in (("detectable", "{:.3f}"), ("p_holm", "{:.4f}"))
    )
    return [mean_cell(own, "{:.3f}"), number(own["step"], "{:.0f}"), gap_cell(gap), least, p]


def gains(results: Results, tier: str) -> Table:
    """Gold of each method minus the base model's on each variant, and the smallest gain that would be found."""
    found = {name: variant["gains"] for name, variant in results["tiers"][tier]["analysis"]["variants"].items()}
    rows = [
        (TableCell(method), *(gap_cell(gap[method]) for gap in found.values())) for method in next(iter(found.values()))
    ]
    least = [[gap["detectable"] for gap in variant.values()] for variant in found.values()]
    shown = (TableCell(f"{min(each):.3f} to {max(each):.3f}") for each in least)
    return Table(("method", *found), (*rows, (TableCell("would be found"), *shown)))


def courses(results: Results, tier: str) -> Table:
    """KL and gold at the steps at which all final trainings were measured; without rows where there are none."""
    found = results["tiers"][tier]
    if not found["size"].get("fixed_steps"):
        return Table((), ())
    by_step = {
        (variant, method): {at["step"]: at for at in mean_course([seed["test_curve"] for seed in trained["seeds"]])}
        for variant, methods in found["variants"].items()
        for method, trained in methods.items()
    }
    steps = sorted({step for course in by_step.values() for step in course if step})
    rows = ((*map(TableCell, name), *(_at(course.get(step)) for step in steps)) for name, course in by_step.items())
    return Table(("variant", "method", *(f"step {step:.0f}, KL: gold" for step in steps)), tuple(rows))


def _at(found: Mapping[str, float] | None) -> TableCell:
    return TableCell("–") if found is None else TableCell(f"{found['kl']:.2f}: {found['gold']:.3f}", found["gold"])


def mean_course(curves: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Means over seeds of what was measured at the steps at which all of them were."""
    by_step = [{look["step"]: look for look in curve} for curve in curves]
    shared = sorted(set.intersection(*(set(each) for each in by_step)))
    measured = ("step", "kl", "gold")
    return [{key: statistics.fmean(each[step][key] for each in by_step) for key in measured} for step in shared]


def controls(results: Results) -> Table:
    """The difference of two contenders that have one loss, which is tuning's and chance's alone."""
    rows = [
        (TableCell(tier), TableCell(variant), TableCell(where), *_control_cells(control))
        for tier, found in results["tiers"].items()
        for variant, analysis in found["analysis"]["variants"].items()
        for where, control in _controls_of(analysis)
    ]
    return Table(("tier", "variant", "measured", f"{' minus '.join(SAME_LOSS)}", "p"), tuple(rows))


def _controls_of(analysis: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    everywhere = {"as tuned": analysis, **{f"at KL {target}": at for target, at in analysis["at_kl"].items()}}
    return [(where, found["control"]) for where, found in everywhere.items() if "control" in found]


def _control_cells(control: Mapping[str, float]) -> tuple[TableCell, TableCell]:
    mean, low, high = (f"{control[key]:+.3f}" for key in ("mean", "low", "high"))
    return TableCell(f"{mean} ({low} to {high})", control["mean"]), number(control["p"], "{:.4f}")


def _round(settings: int, steps: int, seeds: int = 1) -> str:
    found = f"{settings} setting{'s' if settings > 1 else ''} of {steps} steps"
    return f"{found} under {seeds} seeds" if seeds > 1 else found


def overview(results: Results) -> Table:
    """Gold and KL of each method on the exact tier's labels as drawn and at the most noise."""
    variants = results["tiers"]["exact"]["analysis"]["variants"]
    names = list(dict.fromkeys([next(iter(variants)), list(variants)[-1]]))
    header = ["", *(f"{key}, {name}" for name in names for key in ("gold", "KL", "gold minus DPO's (95 %)"))]
    rows = []
    for method in variants[names[0]]["methods"]:
        cells = [TableCell(method)]
        for name in names:
            found, gap = variants[name]["methods"][method], variants[name].get("differences", {}).get(method)
            cells += [mean_cell(found["gold"], "{:.3f}"), mean_cell(found["kl"], "{:.2f}"), gap_cell(gap)]
        rows.append(tuple(cells))
    return Table(tuple(header), tuple(rows))


def lengths(results: Results) -> Table:
    """Tokens of a reply after training on each further variant minus those after the first, where a tier has them."""
    rows = [
        (
            TableCell(tier),
            TableCell(f"{variant} minus {next(iter(found['variants']))}"),
            TableCell(method),
            gap_cell(gap, "{:+.1f}"),
            number(gap["p_holm"], "{:.4f}"),
        )
        for tier, found in results["tiers"].items()
        for variant, gaps in found["analysis"].get("lengths", {}).items()
        for method, gap in gaps.items()
    ]
    return Table(("tier", "variant", "method", "tokens of a reply", "p"), tuple(rows))


def lengths_at_kl(results: Results) -> Table:
    """Tokens of a reply where each method's KL was as much as the others', with a star where they differ from the
    baseline's; a row for each method of a tier that has them."""
    header: dict[str, None] = {}
    rows = []
    for tier, found in results["tiers"].items():
        at_kl = found["analysis"].get("tokens_at_kl", {})
        places = [(variant, target) for target in _targets_of(at_kl) for variant in at_kl if target in at_kl[variant]]
        header |= dict.fromkeys(f"KL {target}, {variant}" for variant, target in places)
        for method in next(iter(found["variants"].values())) if at_kl else ():
            cells = (_length_cell(at_kl[variant][target], method) for variant, target in places)
            rows.append((TableCell(tier), TableCell(method), *cells))
    return Table(("tier", "method", *header), tuple(rows))


def _targets_of(at_kl: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return sorted({target for found in at_kl.values() for target in found}, key=float)


def _length_cell(found: Mapping[str, Any], method: str) -> TableCell:
    cell = mean_cell(found["methods"].get(method), "{:.1f}")
    told_apart = found["differences"].get(method, {}).get("p_holm", 1.0) < 0.05
    return cell._replace(text=f"{cell.text}*") if told_apart else cell


def gap_cell(gap: Mapping[str, Any] | None, form: str = "{:+.3f}") -> TableCell:
    """A difference with its interval; a star where p is below 5 % after Holm's correction."""
    if gap is None:
        return TableCell("–")
    star = "*" if gap["p_holm"] < 0.05 else ""
    mean, low, high = (form.format(gap[key]) for key in ("mean", "low", "high"))
    return TableCell(f"{mean}{star} ({low} to {high})", gap["mean"])


def claims(results: Results, *, short: bool = False) -> Table:
    """The five claims; `short` leaves out what each verdict does not say."""
    shown = {"claim": "the chapter says", "measured": "measured", "verdict": "verdict"}
    if not short:
        shown["limit"] = "what this does not say"
    rows = tuple(tuple(TableCell(verdict[key]) for key in shown) for verdict in results["verdicts"])
    return Table(tuple(shown.values()), rows, prose=True)


def sanity(results: Results) -> Table:
    """Swapped and shuffled labels, method by method."""
    rows = []
    for name, tier in results["tiers"].items():
        for row in tier["analysis"].get("sanity", {"methods": []})["methods"]:
            null, shuffled = row["null"], row["shuffled"]
            rows.append(
                (
                    TableCell(name),
                    TableCell(row["name"]),
                    number(row["given"], "{:.1%}"),
                    number(row["swapped"], "{:.1%}"),
                    TableCell(
                        f"{shuffled['mean']:.1%} ({shuffled['low']:.1%} to {shuffled['high']:.1%})", shuffled["mean"]
                    ),
                    number(row.get("likelihood_alone"), "{:.1%}"),
                    number(None if null is None else null["p_holm"], "{:.3f}"),
                    number(None if null is None else null["detectable"], "{:.1%}"),
                    TableCell("yes" if row["holds"] else "NO"),
                )
            )
    tested = ("p", "deviation that would fail", "holds")
    header = ("tier", "method", "given", "swapped", "shuffled", "likelihood term alone", *tested)
    return Table(header, tuple(rows))


def costs(results: Results) -> Table:
    """Peaks and seconds of a step."""
    cost = results["cost"]
    rows = tuple(
        (
            TableCell(name),
            number(found["peak_gib"], "{:.2f}"),
            number(found["step_s"], "{:.2f}"),
            number(found["reference_s"], "{:.2f}"),
            number(found["forward_tokens"], "{:.0f}"),
        )
        for name, found in cost["measured"].items()
    )
    shape = f"{cost['pairs']} pairs of {cost['tokens']} tokens a side"
    header = ("peak, GiB (MLX)", "step without reference, s", "reference before it, s", "tokens without gradient")
    return Table((shape, *header), rows)


def peaks(results: Results) -> Table:
    """Peaks at several lengths and numbers of pairs, by what is trained and how the reference is had."""
    # Results of earlier versions have none.
    rows = results["cost"].get("peaks", [])
    arms = tuple(rows[0]["peaks_gib"]) if rows else ()
    body = tuple(
        (
            TableCell(row["fine_tune_type"]),
            number(row["tokens"], "{:.0f}"),
            number(row["pairs"], "{:.0f}"),
            *(number(row["peaks_gib"][arm], "{:.2f}") for arm in arms),
        )
        for row in rows
    )
    return Table(("trained", "tokens a side", "pairs", *arms), body)


def copies(results: Results) -> Table:
    """Where a second copy of the weights doubles the peak."""
    rows = tuple(
        (
            TableCell(row["model"]),
            TableCell(row["memory"]),
            number(row["tokens"], "{:.0f}"),
            number(row["weights_gib"], "{:.2f}"),
            number(row["peak_gib"], "{:.2f}"),
            number(row["copy_ratio"], "{:.2f}"),
        )
        for row in results["cost"]["predicted"]
    )
    return Table(("model", "--memory", "tokens a side", "weights, GiB", "peak, GiB", "with a copy, times"), rows)
