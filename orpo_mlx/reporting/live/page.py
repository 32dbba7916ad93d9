"""The page that draws a run as it goes on: its skeleton; the scripts and `live.css` beside this module do the rest."""

from __future__ import annotations

import json

from orpo_mlx.reporting.charts import style
from orpo_mlx.reporting.html_page import read_asset, render_page
from orpo_mlx.reporting.metrics_log import (
    ACCURACY,
    KEY,
    LEARNING_RATE,
    LOSS,
    MARGIN,
    MEMORY,
    REWARDS,
    SPEED,
    SPLITS,
    WIN_RATE,
)

CHARTS = (LOSS, ACCURACY, MARGIN, WIN_RATE, REWARDS, LEARNING_RATE, SPEED, MEMORY)
"""What is drawn, in this order."""
_COLOURS = 4


def live_page(name: str) -> str:
    """The page about the run called `name`. What it shows comes from `/news` of the server it came from."""
    colours = "".join(f".colour{number} {{ color: {style(number).color}; }}\n" for number in range(_COLOURS))
    return render_page(
        "reporting/live/page.html.jinja",
        f"Training: {name}",
        style=read_asset("reporting", "live", "live.css") + colours,
        script="".join(read_asset("reporting", "live", name) for name in ("live.js", "drawing.js")),
        live=True,
        key=KEY,
        charts=json.dumps({"charts": [chart._asdict() for chart in CHARTS], "splits": SPLITS}),
    )
