"""The exercise as report.md, report.html and pictures, from its `results.json` alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orpo_mlx.compare.exercise import tables
from orpo_mlx.compare.exercise.analysis import SANITY_ALPHA
from orpo_mlx.compare.exercise.run import failures
from orpo_mlx.files import write_bytes, write_text
from orpo_mlx.reporting.charts import DARK, LIGHT, Panel, label, legend, png, style
from orpo_mlx.reporting.html_page import Picture, Table, render_markdown, render_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from orpo_mlx.reporting.charts import Theme

TITLE = "The chapter's exercise: reward against distance"

Results = Mapping[str, Any]


class Section(NamedTuple):
    """A table with what is to be known about it."""

    title: str
    text: str
    table: Table


def write_page(results: Results, folder: Path) -> list[Path]:
    """Write report.md, report.html and gold_kl.png into `folder`; the paths written."""
    panels = frontier_panels(results)
    write_bytes(folder / "gold_kl.png", png(panels, LIGHT, columns=min(2, len(panels))))
    write_text(folder / "report.md", markdown(results))
    write_text(folder / "report.html", html(results))
    return [folder / name for name in ("results.json", "gold_kl.png", "report.md", "report.html")]


def markdown(results: Results) -> str:
    """The report as Markdown."""
    return render_markdown("compare/exercise/report.md.jinja", **_values(results))


def html(results: Results) -> str:
    """The report as one page that needs nothing beside it."""
    pictures = [
        Picture(_CAPTION, png([panel], LIGHT), png([panel], DARK), _CAPTION) for panel in frontier_panels(results)
    ]
    return render_page("compare/exercise/report.html.jinja", pictures=pictures, **_values(results))


def first_line(results: Results) -> str:
    """What stands before anything else: whether the sanity checks hold."""
    failed = failures(results)
    if failed:
        return f"A SANITY CHECK FAILED ({'; '.join(failed)}): believe nothing below before you know why."
    checked = sum(len(tier["analysis"].get("sanity", {"methods": []})["methods"]) for tier in results["tiers"].values())
    if not checked:
        return "Sanity: not checked here; the checks are the exact tier's, whose labels can be shuffled many times."
    waiting = f" Not finished: {'; '.join(results['unfinished'])}." if results["unfinished"] else ""
    return (
        f"Sanity: swapped labels mirror for all of {checked} methods, and nothing was found to be learned from "
        f"shuffled ones (what would have been found is in the table).{waiting}"
    )


def facts(results: Results) -> dict[str, str]:
    """What was run where and when, as text."""
    versions = {key: value for key, value in results["versions"].items() if key not in ("platform", "device")}
    return {
        "extent": results["extent"],
        "command": results["command"],
        "machine": ", ".join(f"{key} {value}" for key, value in results["machine"].items()),
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items()),
        "commit": results["commit"] or "not from a checkout",
        "date": results["date"],
        "seconds, this call": str(results["seconds"]),
    }


def sections_of(results: Results) -> list[Section]:
    """All tables in the order of the report."""
    found = [
        Section(
            "What the design could find",
            "The smallest true difference in gold to DPO that is found with a chance of 80 %, at 5 % for any false "
            "finding among all methods of a row (Holm): the median over methods, in brackets the least and the most. "
            "Of the errors that were found, as none were known before. Read this before the results.",
            tables.power(results),
        ),
    ]
    if "verdicts" in results:
        found.append(Section("The chapter's claims", "", tables.claims(results)))
    for tier in results["tiers"]:
        for variant in results["tiers"][tier]["variants"]:
            size = results["tiers"][tier]["size"]
            text = (
                "Means over seeds and test prompts, standard errors over both in brackets; each method at its tuned "
                f"setting {_STEPS[size.get('fixed_steps', False)]}, at the KL that is shown. "
                "p: paired bootstrap over prompts and seeds or Student's t, the larger, after Holm."
            )
            first, *others = results["tiers"][tier]["variants"]
            if size.get("tuned_once") and variant in others:
                text += f" Settings are those tuned on {first}."
            found.append(Section(f"{tier} tier, {variant}", text, tables.quality(results, tier, variant)))
            at_kl = tables.equal_kl(results, tier, variant)
            if at_kl.rows:
                found.append(Section(f"{tier} tier, {variant}, at equal KL", _AT_KL, at_kl))
    for tier in results["tiers"]:
        gains = tables.gains(results, tier)
        found.append(Section(f"{tier} tier, gain over the base model", _GAINS, gains))
        courses = tables.courses(results, tier)
        if courses.rows:
            found.append(Section(f"{tier} tier, gold against KL", _COURSES, courses))
    controls = tables.controls(results)
    if controls.rows:
        text = "Two contenders have the same loss, tuned apart: what parts them is tuning's and chance's alone."
        found.append(Section("What tuning and chance do alone", text, controls))
    lengths = tables.lengths(results)
    if lengths.rows:
        text = "What each kind of labels did to the length of replies; paired bootstrap, p after Holm over the methods."
        found.append(Section("Length of replies", text, lengths))
    at_kl = tables.lengths_at_kl(results)
    if at_kl.rows:
        found.append(Section("Length of replies at equal KL", _LENGTHS_AT_KL, at_kl))
    return [*found, *(_sections_of_exact(results) if "exact" in results["tiers"] else ())]


def _sections_of_exact(results: Results) -> list[Section]:
    return [
        Section(
            "Sanity",
            "Share of held-out pairs whose better side a method's own reward was moved towards. Swapped must be below "
            "given and below 50 %; shuffled must be 50 %, or, with a likelihood term, that term's own share on the "
            f"same shuffles: at {SANITY_ALPHA:.0%} for any false alarm.",
            tables.sanity(results),
        ),
        Section("Costs of a step", "Measured; seconds are of a shared machine.", tables.costs(results)),
        Section(
            "Peaks by length, pairs, and what is trained",
            "MLX's peak of a step, GiB, measured; a precomputed reference is no part of it.",
            tables.peaks(results),
        ),
        Section("A second copy of the weights", "Predicted peaks of a step.", tables.copies(results)),
    ]


_STEPS = {
    False: "and its best step within the KL bound and the steps of a training",
    True: "and number of steps, which were within the KL bound on valid prompts",
}
_AT_KL = (
    "The same trainings where each one's own KL was that much, interpolated between looks on test prompts. Settings "
    "are those tuned for the KL bound and the number of steps; p as above, over the methods that got there."
)
_GAINS = (
    "Gold minus the base model's on the same prompts, with 95 % intervals, as tuned; a star where p is below 5 % after "
    "Holm over the methods; the last row has the smallest true gain that is found with a chance of 80 %."
)
_COURSES = "KL (nats per reply) and gold at each checkpoint of the final trainings, means over seeds and test prompts."
_LENGTHS_AT_KL = (
    "Tokens of a reply where each training's own KL was that much, means over seeds, standard errors over these alone; "
    "a star where the difference to DPO's has p below 5 % after Holm."
)
_CAPTION = (
    "Gold against KL to the base model: each training of the variant's own tuning at its best step, on valid prompts "
    "(small), final trainings on test prompts, their course by look and their best step, means over seeds (thin line, "
    "large, with one standard error of gold), the base model on these (cross), and, in the exact tier, an estimate of "
    "the highest gold there is at a KL (thick line)."
)


def frontier_panels(results: Results) -> list[Panel]:
    """Gold against KL, a panel for each tier and variant."""
    return [
        frontier_panel(tier, variant, f"{name} tier, {variant}")
        for name, tier in results["tiers"].items()
        for variant in tier["variants"]
    ]


def frontier_panel(tier: Mapping[str, Any], variant: str, title: str) -> Panel:
    """Gold against KL of every method on one variant."""

    def draw(axes: Axes, theme: Theme) -> None:
        best = tier["facts"].get("frontier", [])
        # No training is worth anything beyond the bound, and a longer line would flatten everything else.
        shown = [point for point in best if point["kl"] <= tier["size"]["kl_bound"]]
        axes.plot([p["kl"] for p in shown], [p["gold"] for p in shown], color=theme.ink, linewidth=2)
        axes.scatter(
            [0], [statistics.fmean(tier["base"]["gold"])], s=60, color=theme.ink, marker="+", label="base model"
        )
        borrowed = tier["size"].get("tuned_once") and variant != next(iter(tier["variants"]))
        for number, (name, method) in enumerate(tier["variants"][variant].items()):
            look = style(number)
            own = [] if borrowed else method["tuning"]
            kl, gold = ([entry[key] for entry in own] for key in ("kl", "score"))
            axes.scatter(kl, gold, s=10, color=look.color, marker=look.marker, alpha=0.5)
            course = tables.mean_course([seed.get("test_curve", []) for seed in method["seeds"]])
            line = {"color": look.color, "linestyle": look.dash, "linewidth": 0.8}
            axes.plot([p["kl"] for p in course], [p["gold"] for p in course], **line)
            found = tier["analysis"]["variants"][variant]["methods"][name]
            kl, gold = ([found[key]["mean"]] for key in ("kl", "gold"))
            axes.errorbar(kl, gold, yerr=[found["gold"]["standard_error"]], color=look.color, elinewidth=0.8)
            axes.scatter(kl, gold, s=60, color=look.color, marker=look.marker, label=label(name, 24))
        axes.set_title(label(title))
        axes.set_xlabel("KL to the base model (nats per reply)")
        axes.set_ylabel("gold")
        legend(axes)

    return draw


def _values(results: Results) -> dict[str, Any]:
    shown = {"first": first_line(results), "facts": facts(results), "sections": sections_of(results)}
    return {"title": TITLE, "caption": _CAPTION, **shown}
