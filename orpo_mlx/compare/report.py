"""A comparison as `report.md`, `report.html` and pictures, from its `results.json` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orpo_mlx.compare import tables
from orpo_mlx.compare.charts import accuracy_panel, loss_panels, memory_panel, sensitivity_panels, time_panel
from orpo_mlx.files import write_atomically, write_text
from orpo_mlx.reporting.charts import DARK, LIGHT, Panel, png
from orpo_mlx.reporting.html_page import Cell, Table, definition_list, markdown_text, page, picture, text

Results = Mapping[str, Any]

TITLE = "Preference methods side by side"

_SECTIONS: tuple[tuple[str, Callable[[Results], Table], str], ...] = (
    (
        "The chapter's table, verified",
        tables.claims,
        "Each claim of the course chapter on ORPO with what was measured here, by the command above.",
    ),
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
        "each batch swapped at random): it should stay within the base model's interval; a likelihood term learns from "
        "both sides all the same, and may move it.",
    ),
    ("Replies before and after", tables.replies, "Greedy, to ten held-out prompts, under seed 0."),
)


def write_comparison(results: Results, folder: Path) -> list[Path]:
    """Write the reports about `results` into `folder`; the paths written.

    Raises:
        OSError: the folder cannot be written.
    """
    pictures = _pictures(results)
    written = [folder / "results.json"]
    for name, (panels, _) in pictures.items():
        written.append(folder / f"{name}.png")
        content = png(panels, LIGHT, columns=min(2, len(panels)))
        write_atomically(written[-1], _writer(content))
    for name, document in (("report.md", markdown(results)), ("report.html", html(results, pictures))):
        written.append(folder / name)
        write_text(written[-1], document)
    return written


def markdown(results: Results) -> str:
    """The report as Markdown, with its pictures beside it."""
    parts = [f"# {TITLE}", *(f"- {key}: {markdown_text(value)}" for key, value in facts(results).items()), ""]
    for title, table, words in _sections(results):
        parts += [f"## {title}", "", markdown_text(words), "", table.markdown(), ""]
    parts += ["## Pictures", ""]
    parts += [f"![{words}]({name}.png)\n" for name, (_, words) in _pictures(results).items()]
    return "\n".join(parts)


def html(results: Results, pictures: Mapping[str, tuple[list[Panel], str]]) -> str:
    """The report as one self-contained page."""
    sections = [
        f"<h2>{text(title)}</h2>\n<p>{text(words)}</p>\n{table.html()}" for title, table, words in _sections(results)
    ]
    # One by one, so that each is as wide as a phone.
    shown = [
        picture(words, png([panel], LIGHT), png([panel], DARK), words)
        for panels, words in pictures.values()
        for panel in panels
    ]
    charts = f'<h2>Pictures</h2>\n<div class="charts">{"".join(shown)}</div>'
    return page(TITLE, [definition_list(facts(results)), sections[0], charts, *sections[1:]])


def facts(results: Results) -> dict[str, str]:
    """What was run where and when, in words."""
    machine, versions, pairs = results["machine"], results["versions"], results["data"]["pairs"]
    return {
        "model": str(results["settings"]["model"]),
        "data": f"{results['settings']['data']}: {', '.join(f'{count} {name}' for name, count in pairs.items())} pairs",
        "budget of every method": results["budget"]["words"],
        "seeds": str(results["seeds"]),
        "pairs per step": str(results["settings"]["batch_size"] * results["settings"]["grad_accumulation_steps"]),
        "machine": ", ".join(f"{key} {value}" for key, value in machine.items()),
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items() if key not in ("platform", "device")),
        "date": results["date"],
        "command": results["command"],
    }


def _sections(results: Results) -> list[tuple[str, Table, str]]:
    """Sections; one whose table would be empty says so instead."""
    found = []
    for title, build, words in _SECTIONS:
        table = build(results)
        if table.rows:
            found.append((title, table, words))
        elif build is tables.sanity:
            none = Table(("not run",), ((Cell("give --sanity and a method to train it on wrong labels"),),), prose=True)
            found.append((title, none, words))
    return found


def _pictures(results: Results) -> dict[str, tuple[list[Panel], str]]:
    """Panels and captions by file name."""
    found: dict[str, tuple[list[Panel], str]] = {
        "accuracy": ([accuracy_panel(results)], "Valid accuracy by step; bands: range over seeds."),
        "time_accuracy": ([time_panel(results)], "Valid accuracy by training time; bands: range over seeds."),
        "memory": ([memory_panel(results)], "Peak memory."),
        "loss": (loss_panels(results), "Training loss, trailing means of five steps; bands: range over seeds."),
    }
    heat_maps = sensitivity_panels(results)
    if heat_maps:
        found["sensitivity"] = (heat_maps, "Valid accuracy at the end of the budget by learning rate and β.")
    return found


def _writer(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write
