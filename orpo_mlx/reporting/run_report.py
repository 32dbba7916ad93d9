"""A training run, or several laid over each other, as a page and a picture, from the lines they left."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from orpo_mlx.errors import DataError
from orpo_mlx.files import read_json_table, write_bytes, write_text
from orpo_mlx.reporting.charts import DARK, LIGHT, Panel, Theme, label, legend, png, style, whole_steps
from orpo_mlx.reporting.html_page import Picture, Table, TableCell, render_page
from orpo_mlx.reporting.metrics_log import (
    ACCURACY,
    KEY,
    KL,
    LOSS,
    MARGIN,
    SPEED,
    SPLITS,
    WIN_RATE,
    Chart,
    Points,
    RunLog,
    Sample,
    read_run,
    read_samples,
)
from orpo_mlx.run_folder import REPORT_PAGE, REPORT_PICTURE, RUN_FILE
from orpo_mlx.text import printable, shareable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_CHARTS = (LOSS, ACCURACY, MARGIN, KL, WIN_RATE, SPEED)
# Runs that are named above a picture; more would leave it no room.
_MOST_HEADINGS = 4


class SplitLine(NamedTuple):
    """How the values of a split are drawn."""

    dash: str
    marker: str
    filling: Literal["full", "none"]


SPLIT_LINES = {
    "train": SplitLine("-", "", "full"),
    "valid": SplitLine("--", "o", "full"),
    # A test has no values between its markers.
    "test": SplitLine("", "s", "none"),
}


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Write `report.html` and `report.png` about the runs in `folders` into `output`; the paths written.

    Raises:
        DataError: a folder without reports.
        OSError: `output` cannot be written.
    """
    runs = with_different_names(folders, [read_run(folder) for folder in folders])
    # A chart of nothing is left out: the cells of a comparison report fewer metrics.
    panels = {chart: metric_panel(runs, chart) for chart in _CHARTS if is_reported(runs, chart.keys[0])}
    facts = [run_facts(folder) for folder in folders]
    page = render_page(
        "reporting/run_report.html.jinja",
        f"Training: {', '.join(run.name for run in runs)}",
        facts=facts_table(runs, facts),
        summary=summary(runs),
        key=KEY,
        pictures=[
            Picture(chart.title, png([panel], LIGHT), png([panel], DARK), chart.caption)
            for chart, panel in panels.items()
        ],
        sample_replies=sample_replies(runs, folders),
        unread=[f"{run.name}: {lines(run.unread)} of metrics.jsonl passed over." for run in runs if run.unread],
    )
    write_text(output / REPORT_PAGE, page)
    # A number alone would not say what it is of.
    said = [[f"{name} {value}" if " " in name else value for name, value in known.items()] for known in facts]
    heading = [f"{run.name}: {', '.join(each)}" for run, each in zip(runs, said, strict=True) if each]
    write_bytes(
        output / REPORT_PICTURE,
        png(list(panels.values()), LIGHT, columns=min(2, len(panels)), heading=heading[:_MOST_HEADINGS]),
    )
    return [output / REPORT_PAGE, output / REPORT_PICTURE]


def run_facts(folder: Path) -> dict[str, str]:
    """What a run is, by what is said of it, from its `run.json`; empty where it has none. Of paths only the last part:
    a report is shown to others."""
    try:
        table = read_json_table(folder / RUN_FILE, DataError)
    except DataError:
        return {}
    settings = table.get("settings")
    if not isinstance(settings, dict):
        return {}
    rate = settings.get("learning_rate")
    facts = {
        "method": settings.get("method"),
        "model": settings.get("model"),
        "data": settings.get("data"),
        "learning rate": f"{rate:g}" if isinstance(rate, float) else None,
        "pairs per step": settings.get("batch_size"),
        # With a space, at which a narrow column breaks it.
        "started": str(table["started"]).replace("T", " ") if table.get("started") else None,
    }
    return {name: printable(str(shareable(value))) for name, value in facts.items() if value is not None}


def facts_table(runs: Sequence[RunLog], facts: Sequence[Mapping[str, str]]) -> Table | None:
    """A row for each run that says what it is; None where none does."""
    columns = list(dict.fromkeys(name for known in facts for name in known))
    rows = [
        (TableCell(run.name), *(TableCell(known.get(name, "not recorded")) for name in columns))
        for run, known in zip(runs, facts, strict=True)
    ]
    return Table(("run", *columns), tuple(rows), prose=True) if columns else None


class PromptReplies(NamedTuple):
    """The replies to one prompt, step by step."""

    prompt: str
    replies: list[Sample]


def sample_replies(runs: Sequence[RunLog], folders: Sequence[Path]) -> list[tuple[str, list[PromptReplies]]]:
    """Titles and replies of each run that has some."""
    found = []
    for run, folder in zip(runs, folders, strict=True):
        samples = read_samples(folder)
        if samples:
            title = "Sample replies" if len(runs) == 1 else f"Sample replies: {run.name}"
            prompts = dict.fromkeys(sample.prompt for sample in samples)
            own = [PromptReplies(each, [sample for sample in samples if sample.prompt == each]) for each in prompts]
            found.append((title, own))
    return found


def lines(count: int) -> str:
    return f"{count} line{'s' if count > 1 else ''} without a report"


def refresh_report(folder: Path) -> None:
    """Write the report of the run in `folder` into it, if it has reported anything yet."""
    try:
        read_run(folder)
    except DataError:
        return
    write_report([folder], folder)


def with_different_names(folders: Sequence[Path], runs: Sequence[RunLog]) -> list[RunLog]:
    """Runs whose folders share a name go by their paths."""
    names = [run.name for run in runs]
    return [
        run._replace(name=str(folder)) if names.count(run.name) > 1 else run
        for folder, run in zip(folders, runs, strict=True)
    ]


def is_reported(runs: Sequence[RunLog], key: str) -> bool:
    """Whether any run has values of this metric."""
    return any(run.points(split, key) for run in runs for split in run.reports)


def metric_panel(runs: Sequence[RunLog], chart: Chart) -> Panel:
    """One metric of every run; a panel's key is `KEY`."""
    (key,) = chart.keys

    def draw(axes: Axes, theme: Theme) -> None:
        for number, run in enumerate(runs):
            splits = [split for split in SPLITS if run.points(split, key)]
            for split in splits:
                # One run has a style for each split; several have one for each run, which is named once.
                several = len(runs) > 1
                look = style(number if several else SPLITS.index(split))
                name = split if not several else label(run.name) if split == splits[0] else ""
                draw_line(axes, run.points(split, key), chart.factor, SPLIT_LINES[split], look.color, name)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(chart.title)
        whole_steps(axes)
        if chart.factor == 100:
            # A share in percent, with room for the markers at its ends.
            axes.set_ylim(-3, 103)
        legend(axes)

    return draw


def draw_line(axes: Axes, points: Points, factor: float, line: SplitLine, color: str, name: str) -> None:
    """One metric of one split; a single point is drawn as a dot where a line alone would not be seen."""
    steps, values = zip(*points, strict=True)
    axes.plot(
        steps,
        [factor * value for value in values],
        color=color,
        linestyle=line.dash,
        marker=line.marker or ("." if len(points) == 1 else ""),
        fillstyle=line.filling,
        markersize=6,
        linewidth=1.5,
        label=name,
    )


def summary(runs: Sequence[RunLog]) -> Table:
    """A row for each run: how far it got, held-out metrics before and after, what it took."""
    columns: dict[str, Callable[[RunLog], TableCell]] = {
        "run": lambda run: TableCell(run.name),
        "steps": steps_cell,
        "training loss": first_and_last("train", "loss", "{:.4f}"),
    }
    for split in SPLITS[1:]:
        if any(split in run.reports for run in runs):
            # Single completions have none.
            if any(run.points(split, "accuracies/mean_logps") for run in runs):
                columns[f"{split} accuracy"] = first_and_last(split, "accuracies/mean_logps", "{:.1%}")
            columns[f"{split} NLL of chosen, nats/token"] = first_and_last(split, "nll_loss", "{:.3f}")
    columns["pair tokens/s, median"] = over_reports("pair_tokens_per_s", statistics.median, "{:.0f}")
    columns["peak memory, GiB"] = over_reports("peak_memory_gib", max, "{:.2f}")
    rows = tuple(tuple(column(run) for column in columns.values()) for run in runs)
    return Table(tuple(columns), rows)


def steps_cell(run: RunLog) -> TableCell:
    """The last step that reported anything."""
    last = max((step for reports in run.reports.values() for step in reports), default=0)
    return TableCell(str(last), last)


def first_and_last(split: str, key: str, form: str) -> Callable[[RunLog], TableCell]:
    """A column with a metric's first and last value, which it is sorted by."""

    def cell(run: RunLog) -> TableCell:
        values = [value for _, value in run.points(split, key)]
        if not values:
            return TableCell("not measured")
        ends = values[:1] if len(values) == 1 else [values[0], values[-1]]
        return TableCell(" → ".join(map(form.format, ends)), values[-1])

    return cell


def over_reports(key: str, summed_up: Callable[[list[float]], float], form: str) -> Callable[[RunLog], TableCell]:
    """A column with one number of a metric's training reports."""

    def cell(run: RunLog) -> TableCell:
        values = [value for _, value in run.points("train", key)]
        return TableCell(form.format(summed_up(values)), summed_up(values)) if values else TableCell("not measured")

    return cell
