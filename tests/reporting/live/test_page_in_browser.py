"""A page that is open while a run goes on, in a real browser. Left out, and said so, where none is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.reporting.live import server as live_server
from orpo_mlx.reporting.live.feed import ENDED, GOING_ON, Feed
from orpo_mlx.reporting.live.page import CHARTS
from orpo_mlx.reporting.live.server import LiveServer, serving
from tests.helpers.headless_browser import Browser

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


class Served:
    """A run's folder and its page, open in the browser."""

    def __init__(self, folder: Path, browser: Browser, stack: ExitStack) -> None:
        self.metrics, self.browser = folder / "metrics.jsonl", browser
        record = {"settings": {"method": "orpo"}, "total_steps": 40, "resumed_at": []}
        (folder / "run.json").write_text(json.dumps(record))
        self.said: list[str] = []
        self.feed = Feed(folder, lambda: self.said, GOING_ON)
        self._stack = stack
        self.server: LiveServer = stack.enter_context(serving(self.feed, 0, "--port"))

    def write(self, rows: Sequence[dict[str, Any] | str], mode: str = "a") -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        with self.metrics.open(mode) as file:
            file.write("".join(line + "\n" for line in lines))

    def open(self, **how: Any) -> None:
        self.browser.events.clear()
        self.browser.open(self.server.address, **how)

    def wait_for(self, identifier: str, words: str) -> None:
        self.browser.wait(f"document.getElementById('{identifier}').textContent.includes({json.dumps(words)})")

    def text(self, identifier: str) -> str:
        return str(self.browser.run(f"document.getElementById('{identifier}').textContent"))

    def cells(self) -> dict[str, list[str]]:
        script = "[...document.getElementById('figures').rows].map((r) => [...r.cells].map((c) => c.textContent))"
        return {first: rest for first, *rest in self.browser.run(script)}

    def end(self) -> None:
        self._stack.close()


@pytest.fixture
def served(tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(live_server, "_PACE_S", 0.05)
    monkeypatch.setattr(live_server, "_POLL_S", 0.02)
    monkeypatch.setattr(live_server, "_LINGER_S", 1.0)
    folder = tmp_path / EVIL.replace("/", "-")
    folder.mkdir()
    with ExitStack() as stack:
        yield Served(folder, browser, stack)
    browser.call("Page.navigate", url="about:blank")


def row(step: int, split: str = "train", **more: Any) -> dict[str, Any]:
    return {"step": step, "split": split, "loss": 1 / (step + 1), "rewards/margins": 0.5 * step, **more}


def test_it_draws_what_comes_and_starts_over_where_the_file_is_cut(browser: Browser, served: Served) -> None:
    served.open(width=400)
    served.wait_for("state", "The run is going on.")
    assert browser.run("document.querySelectorAll('figure:not([hidden])').length") == 0
    served.write([row(0, "valid"), *(row(step, learning_rate=1e-4) for step in range(1, 20))])
    served.wait_for("place", "step 19 of 40")
    assert served.cells()["loss (nats)"] == ["0.5000 → 0.05000", "1.000"]
    assert served.cells()["learning rate"] == ["1.00e-4 → 1.00e-4", "–"]
    assert browser.run("document.querySelectorAll('figure:not([hidden])').length") == 3
    assert browser.run("document.getElementById('bar').value") == pytest.approx(19 / 40)
    assert browser.run("document.title").startswith("19/40 Training: ")
    # A figure that was not finite leaves a gap in its line.
    served.write([row(20) | {"loss": None}, row(21)])
    served.wait_for("unread", "not finite, and are gaps in the lines: 1")
    assert browser.run("document.querySelector('.plot .line').getAttribute('d').match(/M/g).length") == 2
    # A run that is resumed from step 10 cuts its file and writes on.
    served.write([row(0, "valid"), *(row(step) for step in range(1, 11)), row(11, loss=0.125)], "w")
    served.wait_for("place", "step 11 of 40")
    assert served.cells()["loss (nats)"] == ["0.5000 → 0.1250", "1.000"]
    assert served.text("unread") == ""
    assert browser.run("document.documentElement.scrollWidth") <= 400
    assert browser.complaints() == []
    assert all(url.startswith(served.server.address) for url in browser.requests())


@pytest.mark.parametrize(
    "values", [[1e-4], [1e-4, 0.0], [2e9, 2e9 + 5], [1e-30], [-3.5, 0.125], [0.0], [1234.5, 1234.6]]
)
def test_no_two_ticks_have_the_same_words(browser: Browser, served: Served, values: list[float]) -> None:
    served.write([row(step, learning_rate=value) for step, value in enumerate(values, 1)])
    served.open()
    served.wait_for("place", f"step {len(values)} of 40")
    plot = [chart.title for chart in CHARTS].index("learning rate")
    texts = f"document.querySelectorAll('.plot')[{plot}].querySelectorAll('[text-anchor=end]')"
    words = browser.run(f"[...{texts}].map((text) => text.textContent)")
    numbers = [float(word) for word in words]
    assert len(set(words)) == len(words) >= 2
    assert numbers == sorted(numbers)
    assert max(abs(a - b) for a in numbers for b in values) <= 2 * max(
        max(values) - min(values), max(map(abs, values)), 1
    )


def test_what_files_say_is_text(browser: Browser, served: Served) -> None:
    served.said.append(f"prompt {EVIL}\x1b[2J")
    served.write(
        ["{", "[1]", "null", '{"step": 1e999, "split": "train"}', '{"__proto__": {"step": 1}, "split": "train"}']
    )
    served.write([row(1, EVIL), row(-2), row(2, loss=EVIL, other=EVIL), {"step": EVIL, "split": "train"}, row(3)])
    served.open()
    served.wait_for("place", "step 3 of 40")
    served.wait_for("said", f"prompt {EVIL}\\x1b[2J")
    served.wait_for("unread", "no report: 8. Figures that were not finite, and are gaps in the lines: 1.")
    assert browser.run("document.images.length") == 0
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.querySelector('h1').textContent") == f"Training: {EVIL.replace('/', '-')}"
    assert browser.complaints() == []
    assert not [event for event in browser.events if event.get("method") == "Page.javascriptDialogOpening"]


def test_the_end_is_told_and_the_drawing_stays(browser: Browser, served: Served) -> None:
    served.write([row(step) for step in range(1, 40)])
    served.open()
    served.wait_for("place", "step 39 of 40")
    served.write([row(40), row(40, "test")])
    served.feed.state = ENDED
    served.end()
    served.wait_for(
        "state", "The run is done: all 40 steps. This page is no longer served; the drawing stays as it is."
    )
    assert served.cells()["loss (nats)"] == ["0.5000 → 0.02439", "0.02439"]
    assert browser.run("document.querySelectorAll('.plot .line').length") == 2
    assert browser.run("document.getElementById('again').hidden") is False
    assert browser.complaints() == []


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 24, 28)")])
def test_it_works_with_the_keyboard(browser: Browser, served: Served, scheme: str, paper: str) -> None:
    served.write([row(step) for step in range(1, 21)])
    served.open(width=1400, scheme=scheme)
    served.wait_for("place", "step 20 of 40")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == paper
    reached = []
    for _ in range(7):
        browser.press("Tab", 9)
        reached.append(browser.run("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
        if reached[-1] == "cursor":
            browser.press("ArrowLeft", 37)
            served.wait_for("looked", "19")
            label = browser.run("document.querySelector('.plot').getAttribute('aria-label')")
            assert label == "loss (nats), at step 19: train 0.05000"
        if reached[-1] == "pause":
            browser.press(" ", 32)
    assert [name for name in reached if name][:5] == ["range", "average", "cursor", "pause", "Figures"]
    # While it is paused it takes in, and does not draw, what comes; then all of it.
    assert browser.run("document.getElementById('pause').getAttribute('aria-pressed')") == "true"
    served.write([row(21)])
    browser.wait("answers.length > 0")
    assert "step 20 of 40" in served.text("place")
    browser.run("document.getElementById('pause').click()")
    served.wait_for("place", "step 21 of 40")
    assert served.text("looked") == "19"


def test_a_long_run_is_drawn_with_few_points_and_its_outliers(browser: Browser, served: Served) -> None:
    served.write([row(step, loss=9.0 if step == 12_345 else 1.0) for step in range(1, 30_001)])
    served.open()
    served.wait_for("place", "step 30000 of 40")
    path = browser.run("document.querySelector('.plot .line').getAttribute('d')")
    assert path.count("L") < 5000
    top = min(float(point.split(" ")[1]) for point in path[1:].split("L"))
    assert top < 0.2 * browser.run("document.querySelector('.plot').clientHeight")
    served.write([row(30_001)])
    served.wait_for("place", "step 30001 of 40")
