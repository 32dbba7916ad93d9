"""A comparison as `report.md`, `report.html` and pictures, from its `results.json` alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from orpo_mlx.compare import tables
from orpo_mlx.compare.charts import accuracy_panel, loss_panels, memory_panel, sensitivity_panels, time_panel
from orpo_mlx.compare.results import Results
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.files import write_bytes, write_text
from orpo_mlx.reporting.charts import DARK, LIGHT, Panel, png
from orpo_mlx.reporting.html_page import Picture, Table, TableCell, render_markdown, render_page

TITLE = "Preference methods side by side"


class Section(NamedTuple):
    """A table with what is to be known about it."""

    title: str
    table: Table
    text: str


class PanelPicture(NamedTuple):
    """A picture of one or more panels."""

    name: str
    """Of its file, without `.png`."""
    panels: list[Panel]
    caption: str


_CHAPTER = (
    "The chapter's table, verified",
    tables.claims,
    "Each claim of the course chapter on ORPO with what was measured here, by the command above.",
)
_OWN_DATA = (
    "Five claims about ORPO and DPO, on this data",
    tables.claims,
    "What a course chapter on ORPO says of the two, with what was measured here, by the command above.",
)
_SECTIONS: tuple[tuple[str, Callable[[Results], Table], str], ...] = (
    (
        "What each method reached",
        tables.quality,
        "On held-out pairs no method was trained or tuned on. Means over seeds, ranges over seeds in brackets; for "
        "accuracies, 95 % intervals that count each pair once, however many seeds judged it. KL: replies sampled at "
        "temperature 1 and cut at 64 tokens, summed over whole next-token distributions. Replies, their length and "
        "distinct-2: greedy.",
    ),
    (
        "What each method cost",
        tables.cost,
        "Training time counts the reference pass and the steps, not loading and judging. MLX's peak is that of "
        "training; the process's at most includes loading and judging. A second copy as reference runs within "
        "the steps.",
    ),
    (
        "Sensitivity",
        tables.sensitivity,
        "Range of the valid accuracy at the end of the budget over the grid below, under seed 0.",
    ),
    (
        "Learning rates and β that were tried",
        tables.grid,
        "Chosen: best valid accuracy, then lowest NLL of the chosen side, at the default β.",
    ),
    (
        "Sanity",
        tables.sanity,
        "The same training on wrong labels. Swapped: the accuracy must fall below the base model's. Shuffled (half of "
        "each batch swapped at random): shown beside it; whether it is chance takes several shuffles and each method's "
        "own reward, which `compare --quick` and `--full` test.",
    ),
    ("Replies before and after", tables.replies, "Greedy, to ten held-out prompts, under seed 0."),
)


def write_comparison(results: Results, folder: Path) -> list[Path]:
    """Write the reports about `results` into `folder`; the paths written."""
    written = [folder / "results.json"]
    for picture in pictures_of(results):
        written.append(folder / f"{picture.name}.png")
        write_bytes(written[-1], png(picture.panels, LIGHT, columns=min(2, len(picture.panels))))
    for name, document in (("report.md", markdown(results)), ("report.html", html(results))):
        written.append(folder / name)
        write_text(written[-1], document)
    return written


def first_line(results: Results) -> str:
    """What stands before anything else: whether a sanity check failed."""
    failed = [f"{row['name']}, labels {row['labels']}" for row in results["sanity"] if row["holds"] is False]
    if failed:
        return f"A SANITY CHECK FAILED ({'; '.join(failed)}): believe nothing below before you know why."
    return f"Sanity: {len(results['sanity'])} trainings on wrong labels, no check failed."


def markdown(results: Results) -> str:
    """The report as Markdown, with its pictures beside it."""
    return render_markdown(
        "compare/report.md.jinja",
        title=TITLE,
        first=first_line(results),
        facts=facts(results),
        sections=sections_of(results),
        pictures=pictures_of(results),
    )


def html(results: Results) -> str:
    """The report as one self-contained page."""
    return render_page(
        "compare/report.html.jinja",
        TITLE,
        first=first_line(results),
        facts=facts(results),
        sections=sections_of(results),
        # One panel a picture, so that each is as wide as a phone.
        pictures=[
            Picture(picture.caption, png([panel], LIGHT), png([panel], DARK), picture.caption)
            for picture in pictures_of(results)
            for panel in picture.panels
        ],
    )


def facts(results: Results) -> dict[str, str]:
    """What was run where and when, as text."""
    settings = results["settings"]
    versions = {key: value for key, value in results["versions"].items() if key not in ("platform", "device")}
    pairs = ", ".join(f"{count} {name}" for name, count in results["data"]["pairs"].items())
    return {
        "model": str(settings["model"]),
        "data": f"{settings['data']}: {pairs} pairs",
        "budget of every method": results["budget"]["words"],
        "seeds": str(results["seeds"]),
        "pairs per step": str(settings["batch_size"] * settings["grad_accumulation_steps"]),
        "machine": ", ".join(f"{key} {value}" for key, value in results["machine"].items()),
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items()),
        "date": results["date"],
        "command": results["command"],
    }


def sections_of(results: Results) -> list[Section]:
    """Sections that have something to show; where no sanity check was run, that is said."""
    found = []
    # The chapter's own task is the demo's; on other data its table is one more thing to know.
    demo = results["settings"]["data"] == TrainingConfig.data and results["settings"]["model"] == TrainingConfig.model
    for title, build, text in (_CHAPTER if demo else _OWN_DATA, *_SECTIONS):
        table = build(results)
        if table.rows:
            found.append(Section(title, table, text))
        elif build is tables.sanity:
            cell = TableCell("give --sanity and a method to train it on wrong labels")
            found.append(Section(title, Table(("not run",), ((cell,),), prose=True), text))
    return found


def pictures_of(results: Results) -> list[PanelPicture]:
    """All pictures, in the order of the report."""
    found = [
        PanelPicture("accuracy", [accuracy_panel(results)], "Valid accuracy by step; bands: range over seeds."),
        PanelPicture(
            "time_accuracy", [time_panel(results)], "Valid accuracy by training time; bands: range over seeds."
        ),
        PanelPicture("memory", [memory_panel(results)], "Peak memory."),
        PanelPicture(
            "loss", loss_panels(results), "Training loss, trailing means of five steps; bands: range over seeds."
        ),
    ]
    heat_maps = sensitivity_panels(results)
    if heat_maps:
        caption = "Valid accuracy at the end of the budget by learning rate and β."
        found.append(PanelPicture("sensitivity", heat_maps, caption))
    return found
