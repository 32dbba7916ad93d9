"""Reward accuracy by category, as RewardBench has it: how often the chosen side has the higher reward, per subset.

A row is `prompt, chosen, rejected, subset`. The reward of a model that was trained without a reference is its mean or
summed log-prob; of one that was trained against a reference, log π - log π_ref (Rafailov et al. 2023). RewardBench:
Lambert et al. 2024, arXiv:2403.13787.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_mlx.data.prompts import category_of
from orpo_mlx.data.sources import FileSource
from orpo_mlx.files import save_json, write_bytes, write_text
from orpo_mlx.judging.intervals import Interval, wilson
from orpo_mlx.reporting.charts import DARK, LIGHT, Panel, Theme, label, legend, png, style
from orpo_mlx.reporting.html_page import Picture, Table, TableCell, render_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL = "all"
"""The name of all rows together."""
_NO_CATEGORY = "none given"

Row = Mapping[str, Any]
"""As `engine.score.score_pairs` gives it, of a pair."""

REWARDS: dict[str, tuple[str, Callable[[Row, Row | None], float]]] = {
    "mean_logps": (
        "mean log-prob",
        lambda row, _: float(row["chosen_mean_logps"] - row["rejected_mean_logps"]),
    ),
    "sum_logps": ("summed log-prob", lambda row, _: float(row["chosen_logps"] - row["rejected_logps"])),
    "log_ratio": ("log-ratio to the reference", lambda row, base: _ratio(row, base)),
}
"""By key: what to call it, and the chosen side's reward minus the rejected one's, of a row and the reference's."""


def _ratio(row: Row, base: Row | None) -> float:
    assert base is not None
    sides = [float(row[f"{side}_logps"]) - float(base[f"{side}_logps"]) for side in ("chosen", "rejected")]
    return sides[0] - sides[1]


def categories_of(path: Path) -> dict[str, str]:
    """The `subset` or `category` of each row, by its location `file:line`."""
    found = {}
    for row in FileSource([path]).rows():
        name = category_of(row.value) if isinstance(row.value, dict) else None
        found[row.location] = _NO_CATEGORY if name is None else name
    return found


def accuracies(rows: Sequence[Row], base: Sequence[Row] | None, categories: Sequence[str]) -> dict[str, Any]:
    """Accuracy of each reward in each category and in all, with 95 % intervals (Wilson).

    Args:
        rows: of the model.
        base: of the reference, in the same order; None without one, and then there is no log-ratio.
        categories: of each row.

    Returns:
        by reward: `all` and each category with `accuracy`, `low`, `high`, `pairs`; `mean_of_categories` is their plain
        mean. Equal rewards count half.
    """
    rewards = [name for name in REWARDS if base is not None or name != "log_ratio"]
    bases: Sequence[Row | None] = [None] * len(rows) if base is None else base
    found: dict[str, Any] = {}
    for name in rewards:
        margins = [REWARDS[name][1](*both) for both in zip(rows, bases, strict=True)]
        wins = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]
        by_name = {ALL: _share(wins)}
        for category in sorted(set(categories)):
            by_name[category] = _share([win for win, each in zip(wins, categories, strict=True) if each == category])
        mean = statistics.fmean(each["accuracy"] for key, each in by_name.items() if key != ALL)
        found[name] = {"categories": by_name, "mean_of_categories": mean}
    return found


def _share(wins: Sequence[float]) -> dict[str, float]:
    mean = statistics.fmean(wins)
    found = Interval(mean, *wilson(mean, len(wins)))
    return {"accuracy": found.mean, "low": found.low, "high": found.high, "pairs": len(wins)}


def write_categories(folder: Path, found: Mapping[str, Any], title: str) -> list[Path]:
    """Write `categories.json`, `categories.html` and `categories.png` into `folder`; the paths."""
    names = list(next(iter(found.values()))["categories"])
    # A bar needs its room.
    height = 1.6 + 0.32 * len(names) * len(found)
    light, dark = (png([bars(found)], theme, height=height) for theme in (LIGHT, DARK))
    paths = [folder / f"categories.{ending}" for ending in ("json", "html", "png")]
    save_json(paths[0], found)
    page = render_page(
        "judging/categories.html.jinja",
        f"Reward accuracy: {title}",
        table=table(found),
        pictures=[Picture("accuracy", light, dark, "Bars: 95 % intervals.")],
    )
    write_text(paths[1], page)
    write_bytes(paths[2], light)
    return paths


def table(found: Mapping[str, Any]) -> Table:
    """A row for each category, a column for each reward."""
    names = list(next(iter(found.values()))["categories"])
    rows = []
    for name in names:
        shares = [each["categories"][name] for each in found.values()]
        cells = [
            TableCell(f"{share['accuracy']:.1%} ({share['low']:.1%} to {share['high']:.1%})", share["accuracy"])
            for share in shares
        ]
        rows.append((TableCell(name), TableCell(str(shares[0]["pairs"]), shares[0]["pairs"]), *cells))
    return Table(("category", "pairs", *(REWARDS[name][0] for name in found)), tuple(rows))


def bars(found: Mapping[str, Any]) -> Panel:
    """Accuracies as bars, a group for each category."""

    def draw(axes: Axes, theme: Theme) -> None:
        names = list(next(iter(found.values()))["categories"])
        width = 0.8 / len(found)
        for number, (key, each) in enumerate(found.items()):
            shares = [each["categories"][name] for name in names]
            places = [-place - width * number for place in range(len(names))]
            errors = [
                [100 * (share["accuracy"] - share["low"]) for share in shares],
                [100 * (share["high"] - share["accuracy"]) for share in shares],
            ]
            look = style(number)
            axes.barh(
                places,
                [100 * share["accuracy"] for share in shares],
                height=0.9 * width,
                xerr=errors,
                color=look.color,
                ecolor=theme.ink,
                label=REWARDS[key][0],
            )
        middle = width * (len(found) - 1) / 2
        axes.set_yticks([-place - middle for place in range(len(names))], [label(name, 28) for name in names])
        axes.axvline(50, color=theme.ink, linewidth=0.8)
        axes.set_xlim(0, 100)
        axes.set_xlabel("chosen side has the higher reward (%)")
        legend(axes)

    return draw
