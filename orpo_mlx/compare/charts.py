"""The pictures of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orpo_mlx.compare.results import Results
from orpo_mlx.reporting.charts import Panel, Theme, label, legend, style, whole_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMOOTHED_STEPS = 5
_BARS = {"peak_memory_gib": "MLX", "footprint_peak_gib": "whole process"}


def loss_panels(results: Results) -> list[Panel]:
    """Loss over steps, a panel for each method, since losses of different methods are in different units."""
    return [loss_panel(number, arm) for number, arm in enumerate(results["methods"])]


def accuracy_panel(results: Results) -> Panel:
    """Valid accuracy over steps, one line for each method, with the range over seeds as a band."""

    def draw(axes: Axes, theme: Theme) -> None:
        draw_curves(axes, results, "step", "optimiser step")
        whole_steps(axes)

    return draw


def time_panel(results: Results) -> Panel:
    """Valid accuracy over seconds of training."""
    return lambda axes, theme: draw_curves(axes, results, "seconds", "training time, reference included (s)")


def memory_panel(results: Results) -> Panel:
    """Peak memory of each method: MLX's, and the process's."""

    def draw(axes: Axes, theme: Theme) -> None:
        arms = results["methods"]
        for number, (key, text) in enumerate(_BARS.items()):
            bars = axes.barh(
                [row + 0.38 * (number - 0.5) for row in range(len(arms))],
                [arm["summary"][key]["mean"] for arm in arms],
                height=0.36,
                color=style(number).color,
                label=text,
                hatch="" if number == 0 else "///",
                edgecolor=theme.paper,
                linewidth=0,
            )
            axes.bar_label(bars, [f"{arm['summary'][key]['mean']:.3g}" for arm in arms], padding=3, fontsize=8)
        axes.set_yticks(range(len(arms)), [label(arm["name"], 24) for arm in arms])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("peak memory (GiB)")
        legend(axes)

    return draw


def sensitivity_panels(results: Results) -> list[Panel]:
    """Valid accuracy over learning rate and β, a heat map for each method that was tried at several settings."""
    return [heat_map(arm) for arm in results["methods"] if arm["grid"]]


def loss_panel(number: int, arm: Mapping[str, Any]) -> Panel:
    """Loss of one method over steps: the mean over seeds, with their range as a band."""

    def draw(axes: Axes, theme: Theme) -> None:
        color = style(number).color
        # Runs with a budget of seconds are of different lengths; they are drawn as far as all of them go.
        columns = list(zip(*map(smoothed, arm["losses"]), strict=False))
        steps = range(1, len(columns) + 1)
        axes.fill_between(steps, [*map(min, columns)], [*map(max, columns)], color=color, alpha=0.25, linewidth=0)
        marker = "." if len(columns) == 1 else ""
        axes.plot(steps, [*map(statistics.fmean, columns)], color=color, linewidth=1.6, marker=marker)
        axes.set_title(label(arm["name"]))
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("training loss (as the method defines it)")
        whole_steps(axes)

    return draw


def smoothed(losses: Sequence[float]) -> list[float]:
    """Trailing means of a few steps: single batches are noise."""
    return [statistics.fmean(losses[max(0, end - _SMOOTHED_STEPS) : end]) for end in range(1, len(losses) + 1)]


def draw_curves(axes: Axes, results: Results, key: str, xlabel: str) -> None:
    """Valid accuracy of every method over `step` or `seconds`, from the base model's at 0; bands: range over seeds."""
    base = 100 * results["base"]["valid"]["accuracy"]
    for number, arm in enumerate(results["methods"]):
        look = style(number)
        columns = list(zip(*arm["curves"], strict=False))
        xs = [0.0, *(statistics.fmean(point[key] for point in column) for column in columns)]
        shares = [[base], *([100 * point["accuracy"] for point in column] for column in columns)]
        axes.fill_between(xs, [*map(min, shares)], [*map(max, shares)], color=look.color, alpha=0.18, linewidth=0)
        axes.plot(
            xs,
            [*map(statistics.fmean, shares)],
            color=look.color,
            linestyle=look.dash,
            marker=look.marker,
            markersize=5,
            linewidth=1.6,
            label=label(arm["name"], 24),
        )
    target = 100 * results["target_accuracy"]
    axes.axhline(target, color="#8a8a8a", linewidth=1, linestyle=":")
    axes.annotate(f"{target:g} %", (0, target), xytext=(2, 2), textcoords="offset points", fontsize=8)
    axes.set_ylim(-3, 105)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("preference accuracy, valid (%)")
    legend(axes)


def heat_map(arm: Mapping[str, Any]) -> Panel:
    """Valid accuracy of one method at each learning rate and β."""

    def draw(axes: Axes, theme: Theme) -> None:
        rates = sorted({found["learning_rate"] for found in arm["grid"]})
        # None, of a method without β, cannot be compared with numbers.
        betas = sorted({found["beta"] for found in arm["grid"]}, key=lambda beta: beta or 0.0)
        table = {(found["beta"], found["learning_rate"]): found["accuracy"] for found in arm["grid"]}
        rows = [[table.get((beta, rate)) for rate in rates] for beta in betas]
        numbers = [[float("nan") if share is None else 100 * share for share in row] for row in rows]
        axes.grid(visible=False)
        image = axes.imshow(numbers, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for y, row in enumerate(rows):
            for x, share in enumerate(row):
                # cividis is dark where shares are low, and what failed has the paper's colour.
                ink = theme.ink if share is None else "#000" if share > 0.5 else "#fff"
                shown = "failed" if share is None else f"{share:.1%}"
                axes.text(x, y, shown, ha="center", va="center", color=ink, fontsize=9)
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(betas)), ["none" if beta is None else f"{beta:.3g}" for beta in betas])
        axes.set_xlabel("learning rate")
        axes.set_ylabel("β")
        axes.set_title(label(arm["name"]))
        axes.figure.colorbar(image, ax=axes).set_label("valid accuracy (%)")

    return draw
