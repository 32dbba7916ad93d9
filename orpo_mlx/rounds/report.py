"""The rounds as a page and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_mlx.files import write_bytes, write_text
from orpo_mlx.judging.ranking import summary
from orpo_mlx.reporting.charts import DARK, LIGHT, Panel, Theme, legend, png, style, whole_steps
from orpo_mlx.reporting.html_page import Picture, Table, TableCell, render_page
from orpo_mlx.run_folder import REPORT_PAGE, REPORT_PICTURE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Replies that are shown of the last round.
_SHOWN = 10


def write_report(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `report.html` and `report.png` about the rounds of `record` into `folder`."""
    judged = [each for each in record["rounds"] if each["evaluation"] and each["evaluation"]["win_rate"] is not None]
    panels = [win_rate_panel(judged)] if judged else []
    page = render_page(
        "rounds/rounds_report.html.jinja",
        f"Rounds: {folder.name}",
        judge=record["settings"]["judge"],
        stopped=record["stopped"],
        table=rounds_table(record["rounds"]),
        pictures=[Picture("win rate", png(panels, LIGHT), png(panels, DARK), "Bars: 95 % intervals.")]
        if panels
        else [],
        findings=[finding for each in judged[-1:] for finding in each["evaluation"]["findings"]],
        replies=shown_replies(folder / f"round-{judged[-1]['round']}-replies.jsonl") if judged else [],
    )
    write_text(folder / REPORT_PAGE, page)
    if panels:
        write_bytes(folder / REPORT_PICTURE, png(panels, LIGHT))


def rounds_table(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each round."""
    header = (
        "round",
        "pairs",
        "left out",
        "steps",
        "win rate over the base",
        "at equal length",
        "tokens a reply",
        "KL, nats",
    )
    return Table(header, tuple(tuple(_cells(each)) for each in rounds), prose=True)


def _cells(each: Mapping[str, Any]) -> list[TableCell]:
    pairs = each["pairs"]
    cells = [
        TableCell(str(each["round"]), each["round"]),
        TableCell(f"{pairs['rows']} of {pairs['prompts']} prompts", pairs["rows"]),
        # The marks by which terminals know a setting mean nothing on a page.
        TableCell(summary(pairs["left_out"]).replace("`", "") or "nothing"),
    ]
    found = each["evaluation"]
    if found is None:
        return [*cells, *[TableCell("not measured")] * 5]
    kl = found["kl"]
    return [
        *cells,
        TableCell(str(each["training"]["steps"]), each["training"]["steps"]),
        _rate(found["win_rate"], found["interval"]),
        _rate(found["win_rate_length_controlled"], found["interval_length_controlled"]),
        TableCell(f"{found['candidate']['mean_tokens']:.1f}", found["candidate"]["mean_tokens"]),
        TableCell("not measured") if kl is None else TableCell(f"{kl['per_reply']:.2f}", kl["per_reply"]),
    ]


def _rate(rate: float | None, interval: Sequence[float] | None) -> TableCell:
    if rate is None or interval is None:
        return TableCell("too many judgements failed")
    return TableCell(f"{rate:.1%} ({interval[0]:.1%} to {interval[1]:.1%})", rate)


def shown_replies(path: Path) -> list[dict[str, str]]:
    """Some of a round's replies beside the base's: `prompt`, `baseline` and `candidate` of each."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:_SHOWN]]
    return [{name: str(row[name]) for name in ("prompt", "baseline", "candidate")} for row in rows]


def win_rate_panel(judged: Sequence[Mapping[str, Any]]) -> Panel:
    """Win rates over the rounds, with their intervals."""

    def draw(axes: Axes, theme: Theme) -> None:
        for number, (title, key, interval) in enumerate(
            (
                ("win rate", "win_rate", "interval"),
                ("at equal length", "win_rate_length_controlled", "interval_length_controlled"),
            )
        ):
            found = [each["evaluation"] for each in judged]
            rates = [100 * each[key] for each in found]
            below = [100 * (each[key] - each[interval][0]) for each in found]
            above = [100 * (each[interval][1] - each[key]) for each in found]
            look = style(number)
            axes.errorbar(
                [each["round"] + 0.06 * number for each in judged],
                rates,
                yerr=[below, above],
                color=look.color,
                marker=look.marker,
                linestyle=look.dash,
                capsize=3,
                label=title,
            )
        axes.axhline(50, color=theme.ink, linewidth=0.8)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("round")
        axes.set_ylabel("win rate over the base (%)")
        # Whole rounds with room beside them, where one alone would fill the width with its two marks.
        axes.set_xlim(0.5, max(each["round"] for each in judged) + 0.5)
        whole_steps(axes)
        legend(axes)

    return draw
