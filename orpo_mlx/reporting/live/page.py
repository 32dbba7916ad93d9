"""The page that draws a run as it goes on: its skeleton; `live.js` and `live.css` beside this module do the rest."""

from __future__ import annotations

import html
import json
from importlib.resources import files

from orpo_mlx.reporting.charts import style
from orpo_mlx.reporting.html_page import page, text
from orpo_mlx.reporting.metrics_log import ACCURACY, KEY, LEARNING_RATE, LOSS, MARGIN, MEMORY, REWARDS, SPEED, SPLITS

CHARTS = (LOSS, ACCURACY, MARGIN, REWARDS, LEARNING_RATE, SPEED, MEMORY)
"""What is drawn, in this order."""
_COLOURS = 4
_SKELETON = """
<p id="state" role="status">Waiting for the run.</p>
<p><progress id="bar" max="1" aria-label="steps done"></progress> <span id="place"></span></p>
<noscript><p>This page draws with a script of its own, and scripts are switched off.</p></noscript>
<div id="controls">
<label>Steps <select id="range"><option value="1">all</option><option value="0.5">last half</option>
<option value="0.1">last tenth</option></select></label>
<label>Training averaged over <select id="average"><option value="1">1 report</option>
<option value="5">5 reports</option><option value="20">20 reports</option>
<option value="100">100 reports</option></select></label>
<label id="looking">Look at step <input id="cursor" type="range" min="0" max="0" value="0" step="1">
<output id="looked" for="cursor">newest</output></label>
<button id="pause" type="button" aria-pressed="false">Pause</button>
<button id="again" type="button" hidden>Look again</button>
</div>
"""
_REST = """
<h2>Figures</h2>
<div class="wide" tabindex="0" role="region" aria-label="Figures"><table><thead id="columns"></thead>
<tbody id="figures"></tbody></table></div>
<p id="unread" class="faint"></p>
<div id="saying" hidden>
<h2>What the run says</h2>
<pre id="said" tabindex="0" aria-label="What the run says"></pre>
</div>
"""


def live_page(name: str) -> str:
    """The page about the run called `name`. What it shows comes from `/news` of the server it came from."""
    charts = [chart._asdict() for chart in CHARTS]
    data = html.escape(json.dumps({"charts": charts, "splits": SPLITS}))
    colours = "".join(f".colour{number} {{ color: {style(number).color}; }}\n" for number in range(_COLOURS))
    parts = [
        _SKELETON,
        f'<p class="faint">Over optimiser steps. {text(KEY)}</p>',
        f'<div id="charts" class="charts" data-what="{data}"></div>',
    ]
    return page(
        f"Training: {name}", [*parts, _REST], style=_read("live.css") + colours, script=_read("live.js"), live=True
    )


def _read(name: str) -> str:
    return files("orpo_mlx.reporting.live").joinpath(name).read_text(encoding="utf-8")
