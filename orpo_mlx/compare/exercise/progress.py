"""How far the exercise is: lines on the terminal, and a page with the time left."""

from __future__ import annotations

import statistics
from pathlib import Path

from orpo_mlx.files import write_text
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.html_page import render_page

PAGE = "progress.html"


class ProgressPage:
    """Writes `folder`/progress.html anew after each cell.

    Args:
        folder: of the exercise.
        tier: its part that is running.
        total: cells of this part.
        reporter: where finished cells are said.
        processes: how many compute cells at the same time.
    """

    def __init__(self, folder: Path, tier: str, total: int, reporter: Reporter, processes: int = 1) -> None:
        self._folder, self._tier, self._total, self._reporter = folder, tier, total, reporter
        self._processes = processes
        self._seconds: list[float] = []

    def tell(self, done: int, name: str, seconds: float) -> None:
        """A cell is done; `seconds` is 0 where it was done before."""
        if seconds > 0:
            self._seconds.append(seconds)
        left = (self._total - done) * (statistics.fmean(self._seconds) if self._seconds else 0.0) / self._processes
        line = f"{self._tier}: {done} of {self._total} trainings, {words(left)} left"
        if seconds > 0:
            self._reporter.say(f"{line} ({name}, {seconds:.0f} s)")
        page = render_page("compare/exercise/progress.html.jinja", "The exercise is running", line=line, newest=name)
        write_text(self._folder / PAGE, page)


def words(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
