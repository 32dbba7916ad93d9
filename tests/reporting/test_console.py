"""What a person sees: whole lines at 80 columns, and nothing a terminal would obey."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live

from orpo_mlx.reporting.console import Reporter, eval_line, step_numbers, train_line
from orpo_mlx.reporting.metrics_log import MetricsFile
from orpo_mlx.types import Reply

METRICS = {
    "loss": 12.34567,
    "rewards/accuracies": 0.875,
    "rewards/margins": -12.34567,
    "accuracies/mean_logps": 1.0,
    "accuracies/sum_logps": 0.5,
    "nll_loss": 1.25,
    "pair_tokens_per_s": 12345.6,
    "peak_memory_gib": 12.345,
}


def reporter(width: int = 80, *, terminal: bool = False) -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    return Reporter(Console(file=out, width=width, force_terminal=terminal, highlight=False)), out


@pytest.mark.parametrize("line", [train_line(1000, 1000, METRICS), eval_line(1000, "valid", METRICS)])
def test_lines_fit_80_columns(line: str) -> None:
    assert len(line) <= 80


def test_numbers_carry_their_units() -> None:
    assert step_numbers(METRICS, 100.0, 1.5) == "loss 12.3457 accuracy 0.88 margin -12.346 100 tok/s 1.50 GiB"


@pytest.mark.parametrize(("width", "bar"), [(80, False), (200, True)])
def test_the_bar_gives_way_to_the_numbers(width: int, bar: bool) -> None:
    report, out = reporter(width, terminal=True)
    with report.bar("training", 300, "steps") as advance:
        advance(150, step_numbers(METRICS, 22585.0, 10.0))
    text = out.getvalue()
    assert "150/300" in text
    assert "10.00 GiB" in text
    assert "…" not in text
    assert ("━" in text) == bar


@pytest.mark.parametrize("width", [80, 200])
def test_a_bar_says_what_it_is_of_before_it_has_numbers(width: int) -> None:
    report, out = reporter(width, terminal=True)
    with report.bar("evaluating valid", 300, "pairs"):
        pass
    assert "evaluating valid" in out.getvalue()
    assert "0/300" in out.getvalue()


def test_a_bar_within_a_bar_shares_its_display(monkeypatch: pytest.MonkeyPatch) -> None:
    report, out = reporter(80, terminal=True)
    started: list[Live] = []
    start = Live.start

    def counted(self: Live, refresh: bool = False) -> None:
        started.append(self)
        start(self, refresh)

    monkeypatch.setattr(Live, "start", counted)
    with report.bar("training", 7, "steps") as outer:
        outer(3, "loss")
        with report.bar("evaluating", 9, "pairs") as inner:
            inner(5)
        outer(4, "loss")
    assert len(started) == 1
    assert "5/9" in out.getvalue()
    # Afterwards there is a display for the next one.
    with report.bar("training", 7, "steps"):
        pass
    assert len(started) == 2


@pytest.mark.parametrize(("seconds", "left"), [(1.0, "0:00:06"), (90.0, "0:09:00")])
def test_the_time_remaining_is_that_of_slow_steps_too(seconds: float, left: str) -> None:
    report, out = reporter(80, terminal=True)
    with report.bar("training", 12, "steps") as advance:
        assert report._progress is not None
        clock = itertools.count(0.0, seconds)
        report._progress.get_time = lambda: now
        # A resumed run begins where it was, which took no time.
        for done in (3, 4, 5, 6):
            now = next(clock)
            advance(done)
        report._progress.refresh()
    assert left in out.getvalue()


def test_lines_are_broken_between_words_on_a_terminal_and_never_in_a_file() -> None:
    line = "Warning: " + "word " * 30 + "end"
    for terminal in (True, False):
        report, out = reporter(40, terminal=terminal)
        report.say(line)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
        assert plain.split() == line.split()
        assert (len(plain.strip().splitlines()) > 1) == terminal
        assert ("\x1b[33m" in out.getvalue()) == terminal


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    report, out = reporter(80, terminal=True)
    report.say("Warning: x")
    with report.bar("training", 300, "steps") as advance:
        advance(150, "note")
    assert "150/300" in out.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*m", out.getvalue().replace("\x1b[0m", ""))


def test_nothing_is_drawn_where_output_is_no_terminal() -> None:
    report, out = reporter()
    with report.bar("training", 3, "steps") as advance:
        advance(1, "note")
    assert out.getvalue() == ""


def test_data_is_never_read_as_markup_or_control_codes() -> None:
    report, out = reporter()
    reply = Reply("[red]x[/red]\x1b[2J", "a\nb\x07", 3)
    report.replies([reply], [reply])
    assert "[red]x[/red]" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert "\x07" not in out.getvalue()
    assert "[3 tokens] a b" in out.getvalue()


def test_samples_along_the_way_are_text_too() -> None:
    report, out = reporter()
    report.samples(20, [Reply("[red]x[/red]", "a\x1b[2J\nb", 3)])
    assert out.getvalue() == "step 20  prompt  [red]x[/red]\nstep 20  reply   [3 tokens] a [2J b\n"


def test_the_closing_table_has_every_split() -> None:
    report, out = reporter()
    report.closing_table({"valid": METRICS, "test": METRICS}, {"valid": METRICS, "test": METRICS})
    assert "test after" in out.getvalue()
    assert out.getvalue().count("100.0%") == 4


def test_the_closing_table_of_a_test_has_no_before() -> None:
    report, out = reporter()
    report.closing_table({}, {"valid": METRICS, "test": METRICS})
    assert "before" not in out.getvalue()
    assert "after" not in out.getvalue()
    assert out.getvalue().count("100.0%") == 2


def test_metrics_are_one_object_a_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(1, "train", {"loss": 0.5})
    # Flushed: a run that is killed here has written the line.
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "split": "train", "loss": 0.5}
    ]
    file.close()
