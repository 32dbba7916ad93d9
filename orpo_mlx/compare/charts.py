"""The pictures of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orpo_mlx.reporting.charts import Panel, Theme, label, legend, style, whole_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, Any]
_SMOOTHED = 5


def loss_panels(results: Results) -> list[Panel]:
    """Loss over steps, a panel for each method, since losses of different methods are in different units."""
    return [_loss(number, arm) for number, arm in enumerate(results["methods"])]


def accuracy_panel(results: Results) -> Panel:
    """Valid accuracy over steps, one line for each method, with the range over seeds as a band."""

    def draw(axes: Axes, theme: Theme) -> None:
        _curves(axes, results, "step")
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("preference accuracy, valid (%)")
        whole_steps(axes)

    return draw


def time_panel(results: Results) -> Panel:
    """Valid accuracy over seconds of training."""

    def draw(axes: Axes, theme: Theme) -> None:
        _curves(axes, results, "seconds")
        axes.set_xlabel("training time, reference included (s)")
        axes.set_ylabel("preference accuracy, valid (%)")

    return draw


def memory_panel(results: Results) -> Panel:
    """Peak memory of each method: MLX's, and the process's."""

    def draw(axes: Axes, theme: Theme) -> None:
        arms = results["methods"]
        for number, (key, words) in enumerate(_BARS.items()):
            places = [row + 0.38 * (number - 0.5) for row in range(len(arms))]
            values = [arm["summary"][key]["mean"] for arm in arms]
            look = style(number)
            bars = axes.barh(
                places, values, height=0.36, color=look.color, label=words, hatch="" if number == 0 else "///",
                edgecolor=theme.paper, linewidth=0,
            )  # fmt: skip
            axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axes.set_yticks(range(len(arms)), [label(arm["name"], 24) for arm in arms])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("peak memory (GiB)")
        legend(axes)

    return draw


_BARS = {"peak_memory_gib": "MLX", "footprint_peak_gib": "whole process"}


def sensitivity_panels(results: Results) -> list[Panel]:
    """Valid accuracy over learning rate and β, a heat map for each method that was tried at several settings."""
    return [_heat_map(arm) for arm in results["methods"] if arm["grid"]]


def _loss(number: int, arm: Mapping[str, Any]) -> Panel:
    def draw(axes: Axes, theme: Theme) -> None:
        look = style(number)
        runs = [_smooth(run) for run in arm["losses"]]
        steps = list(range(1, min(map(len, runs)) + 1))
        columns = list(zip(*(run[: len(steps)] for run in runs), strict=True))
        axes.fill_between(
            steps, [min(c) for c in columns], [max(c) for c in columns], color=look.color, alpha=0.25, linewidth=0
        )
        middle = [statistics.fmean(column) for column in columns]
        axes.plot(steps, middle, color=look.color, linewidth=1.6, marker="." if len(steps) == 1 else "")
        axes.set_title(label(arm["name"]))
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("training loss (as the method defines it)")
        whole_steps(axes)

    return draw


def _smooth(run: Sequence[float]) -> list[float]:
    """Trailing means of a few steps: single batches are noise."""
    return [statistics.fmean(run[max(0, end - _SMOOTHED) : end]) for end in range(1, len(run) + 1)]


def _curves(axes: Axes, results: Results, key: str) -> None:
    base = 100 * results["base"]["valid"]["accuracy"]
    for number, arm in enumerate(results["methods"]):
        look = style(number)
        points = min(map(len, arm["curves"]))
        columns = [[curve[place] for curve in arm["curves"]] for place in range(points)]
        places = [0.0, *(statistics.fmean(point[key] for point in column) for column in columns)]
        shares = [[100 * point["accuracy"] for point in column] for column in columns]
        low, high = [base, *map(min, shares)], [base, *map(max, shares)]
        axes.fill_between(places, low, high, color=look.color, alpha=0.18, linewidth=0)
        axes.plot(
            places, [base, *map(statistics.fmean, shares)], color=look.color, linestyle=look.dash, marker=look.marker,
            markersize=5, linewidth=1.6, label=label(arm["name"], 24),
        )  # fmt: skip
    target = 100 * results["target_accuracy"]
    axes.axhline(target, color="#8a8a8a", linewidth=1, linestyle=":")
    axes.annotate(f"{target:g} %", (0, target), xytext=(2, 2), textcoords="offset points", fontsize=8)
    axes.set_ylim(-3, 105)
    legend(axes)


def _heat_map(arm: Mapping[str, Any]) -> Panel:
    def draw(axes: Axes, theme: Theme) -> None:
        rates = sorted({found["learning_rate"] for found in arm["grid"]})
        betas = sorted({found["beta"] for found in arm["grid"]}, key=lambda beta: beta or 0.0)
        table = {(found["beta"], found["learning_rate"]): found["accuracy"] for found in arm["grid"]}
        rows = [[table.get((beta, rate)) for rate in rates] for beta in betas]
        numbers = [[float("nan") if share is None else 100 * share for share in row] for row in rows]
        axes.grid(visible=False)
        image = axes.imshow(numbers, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for y, row in enumerate(rows):
            for x, share in enumerate(row):
                words, ink = (
                    ("failed", theme.ink) if share is None else (f"{share:.1%}", "#000" if share > 0.5 else "#fff")
                )
                axes.text(x, y, words, ha="center", va="center", color=ink, fontsize=9)
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(betas)), ["none" if beta is None else f"{beta:.3g}" for beta in betas])
        axes.set_xlabel("learning rate")
        axes.set_ylabel("β")
        axes.set_title(label(arm["name"]))
        bar = axes.figure.colorbar(image, ax=axes)
        bar.set_label("valid accuracy (%)")

    return draw
