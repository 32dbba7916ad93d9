"""A training run, or several laid over each other, as a page and a picture, from the lines they left."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_mlx.errors import DataError
from orpo_mlx.files import write_atomically, write_text
from orpo_mlx.reporting.charts import DARK, LIGHT, Panel, Theme, label, legend, png, style, whole_steps
from orpo_mlx.reporting.html_page import Cell, Table, page, picture, text
from orpo_mlx.reporting.metrics_log import (
    ACCURACY,
    KEY,
    LOSS,
    MARGIN,
    SPEED,
    SPLITS,
    Chart,
    RunLog,
    Sample,
    read_run,
    read_samples,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_CHARTS = (LOSS, ACCURACY, MARGIN, SPEED)
_HELD_OUT = SPLITS[1:]
_LINES: dict[str, tuple[str, str, Any]] = {
    "train": ("-", "", "full"), "valid": ("--", "o", "full"), "test": ("", "s", "none"),
}  # fmt: skip
"""Line, marker and its filling by split; a test has no values between its markers."""


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Write `report.html` and `report.png` about the runs in `folders` into `output`; the paths written.

    Raises:
        DataError: a folder without reports.
        OSError: `output` cannot be written.
    """
    runs = _named(folders, [read_run(folder) for folder in folders])
    panels = {chart: _panel(runs, chart) for chart in _CHARTS if _drawn(runs, chart.keys[0])}
    parts = [_summary(runs).html()]
    pictures = [
        picture(chart.title, png([panel], LIGHT), png([panel], DARK), chart.caption) for chart, panel in panels.items()
    ]
    parts.append(
        f'<h2>Over the steps</h2>\n<p class="faint">{text(KEY)}</p>\n<div class="charts">{"".join(pictures)}</div>'
    )
    for run, folder in zip(runs, folders, strict=True):
        samples = read_samples(folder)
        if samples:
            title = "Sample replies" if len(runs) == 1 else f"Sample replies: {run.name}"
            parts.append(f"<h2>{text(title)}</h2>\n{_samples(samples).html()}")
    unread = [f"{run.name}: {_lines(run.unread)} of metrics.jsonl passed over." for run in runs if run.unread]
    parts += [f'<p class="faint">{text(line)}</p>' for line in unread]
    names = ", ".join(run.name for run in runs)
    written = [output / "report.html", output / "report.png"]
    write_text(written[0], page(f"Training: {names}", parts))
    picture_bytes = png(list(panels.values()), LIGHT, columns=min(2, len(panels)))
    write_atomically(written[1], lambda temporary: _put(temporary, picture_bytes))
    return written


def _samples(samples: Sequence[Sample]) -> Table:
    rows = [
        (
            Cell(sample.prompt),
            Cell(str(sample.step), sample.step),
            Cell(str(sample.tokens), sample.tokens),
            Cell(sample.text),
        )
        for sample in samples
    ]
    return Table(("prompt", "step", "tokens", "reply"), tuple(rows), prose=True)


def _lines(count: int) -> str:
    return f"{count} line{'s' if count > 1 else ''} without a report"


def refresh_report(folder: Path) -> None:
    """Write the report of the run in `folder` into it, if it has reported anything yet."""
    try:
        read_run(folder)
    except DataError:
        return
    write_report([folder], folder)


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _named(folders: Sequence[Path], runs: Sequence[RunLog]) -> list[RunLog]:
    """Runs whose folders share a name go by their paths."""
    names = [run.name for run in runs]
    return [
        run._replace(name=str(folder)) if names.count(run.name) > 1 else run
        for folder, run in zip(folders, runs, strict=True)
    ]


def _drawn(runs: Sequence[RunLog], key: str) -> bool:
    return any(run.points(split, key) for run in runs for split in run.reports)


def _panel(runs: Sequence[RunLog], chart: Chart) -> Panel:
    """One metric of every run; a panel's key is `KEY`."""
    (key,) = chart.keys

    def draw(axes: Axes, theme: Theme) -> None:
        for number, run in enumerate(runs):
            named = False
            for place, split in enumerate(SPLITS):
                points = run.points(split, key)
                if not points:
                    continue
                # One run has a style for each split, several have one for each run, named once.
                look = style(number if len(runs) > 1 else place)
                dash, marker, fill = _LINES[split]
                steps, values = zip(*points, strict=True)
                axes.plot(
                    steps, [chart.factor * value for value in values], color=look.color, linestyle=dash,
                    marker=marker or ("." if len(points) == 1 else ""), fillstyle=fill, markersize=6, linewidth=1.5,
                    label=split if len(runs) == 1 else "" if named else label(run.name),
                )  # fmt: skip
                named = True
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(chart.title)
        whole_steps(axes)
        if chart.factor == 100:
            axes.set_ylim(-3, 103)
        legend(axes)

    return draw


def _summary(runs: Sequence[RunLog]) -> Table:
    """A row for each run: how far it got, held-out metrics before and after, what it took."""

    def both(split: str, key: str, form: Callable[[float], str]) -> Callable[[RunLog], Cell]:
        def cell(run: RunLog) -> Cell:
            first, last = run.first(split, key), run.last(split, key)
            if first is None or last is None:
                return Cell("not measured")
            return Cell(form(last) if len(run.points(split, key)) == 1 else f"{form(first)} → {form(last)}", last)

        return cell

    def steps(run: RunLog) -> Cell:
        last = max((step for reports in run.reports.values() for step in reports), default=0)
        return Cell(str(last), last)

    def speed(run: RunLog) -> Cell:
        values = [value for _, value in run.points("train", "pair_tokens_per_s")]
        return Cell(f"{statistics.median(values):.0f}", statistics.median(values)) if values else Cell("not measured")

    columns: dict[str, Callable[[RunLog], Cell]] = {
        "run": lambda run: Cell(run.name),
        "steps": steps,
        "training loss": both("train", "loss", "{:.4f}".format),
    }
    for split in _HELD_OUT:
        if any(split in run.reports for run in runs):
            columns[f"{split} accuracy"] = both(split, "accuracies/mean_logps", "{:.1%}".format)
            columns[f"{split} NLL of chosen, nats/token"] = both(split, "nll_loss", "{:.3f}".format)
    columns["pair tokens/s, median"] = speed
    columns["peak memory, GiB"] = _peak
    rows = tuple(tuple(column(run) for column in columns.values()) for run in runs)
    return Table(tuple(columns), rows)


def _peak(run: RunLog) -> Cell:
    values = [value for _, value in run.points("train", "peak_memory_gib")]
    return Cell(f"{max(values):.2f}", max(values)) if values else Cell("not measured")
