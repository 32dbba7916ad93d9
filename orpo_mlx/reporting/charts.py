"""Charts as PNG bytes, for light and dark pages, with colours that the colour-blind can tell apart."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from orpo_mlx.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Theme(NamedTuple):
    """Colours of a page."""

    paper: str
    ink: str
    rule: str


LIGHT = Theme("#ffffff", "#1c1c1c", "#d4d4d4")
DARK = Theme("#16181c", "#e8e8e8", "#3d4148")

# Okabe and Ito 2008 without black and yellow, which vanish on one of the two papers; a grey instead.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vPX"
# Inches: at this width a phone's screen shows the letters at their size.
_WIDTH = 5.0
_HEIGHT = 3.4
_DPI = 140

Panel = Callable[["Axes", Theme], None]
"""Draws one chart."""


class Style(NamedTuple):
    """How one of several things is drawn: no two share a colour, a dash and a marker."""

    color: str
    dash: Any
    marker: str


def style(number: int) -> Style:
    """The style of the `number`th thing, from 0."""
    # Once all colours are used, dashes and markers move on against them.
    shifted = number + number // len(_COLOURS)
    return Style(_COLOURS[number % len(_COLOURS)], _DASHES[shifted % len(_DASHES)], _MARKERS[shifted % len(_MARKERS)])


def label(text: str, width: int = 40) -> str:
    """Text from outside as a label: no control characters, no mathematics, no more than `width` characters."""
    plain = printable(" ".join(text.split())).replace("$", r"\$")
    return plain if len(plain) <= width else plain[: width - 1] + "…"


def png(
    panels: Sequence[Panel], theme: Theme, *, columns: int = 1, height: float = _HEIGHT, heading: Sequence[str] = ()
) -> bytes:
    """The panels as one picture, `columns` side by side, below the lines of a heading."""
    # Here and not above: the live page takes its colours from this module and draws no chart with it.
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    with mpl.rc_context(_settings(theme)):
        figure = Figure((_WIDTH * columns, height * rows), dpi=_DPI, layout="constrained")
        # By hand, without pyplot, which looks for a screen and keeps every figure it has made.
        FigureCanvasAgg(figure)
        for number, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, number)
            axes.grid(visible=True, linewidth=0.6)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            panel(axes, theme)
        if heading:
            # As many characters as the width holds at this size.
            lines = [label(line, 66 * columns) for line in heading]
            figure.suptitle("\n".join(lines), fontsize=9, x=0.01, ha="left")
        # Laid out here, once: `savefig` would draw all of it a first time to do so.
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.execute(figure)
        figure.set_layout_engine(None)
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def legend(axes: Axes) -> None:
    """The legend of a chart with several lines."""
    # Below the axes, so that it covers no line.
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = 1 if max(map(len, labels)) > 22 else min(len(labels), 3)
        axes.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, frameon=False, fontsize=9
        )


def whole_steps(axes: Axes) -> None:
    """Tick whole numbers only along x."""
    locator: Any = axes.xaxis.get_major_locator()
    # One tick is enough where there is one step: to have two, matplotlib would take fractions.
    locator.set_params(integer=True, min_n_ticks=1)


def _settings(theme: Theme) -> Any:
    inks = ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "text.color")
    return {
        **dict.fromkeys(inks, theme.ink),
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "grid.color": theme.rule,
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "axes.titlesize": 11,
    }
