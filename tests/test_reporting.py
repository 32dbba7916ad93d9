"""What a person sees: whole lines at 80 columns, and nothing a terminal would obey."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from orpo_mlx.reporting import MetricsFile, Reporter, eval_line, step_numbers, train_line
from orpo_mlx.samples import Reply

METRICS = {
    "loss": 12.34567, "rewards/accuracies": 0.875, "rewards/margins": -12.34567, "accuracies/mean_logps": 1.0,
    "accuracies/sum_logps": 0.5, "nll_loss": 1.25, "pair_tokens_per_s": 12345.6, "peak_memory_gib": 12.345,
}  # fmt: skip


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


def test_metrics_are_one_object_a_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(1, "train", {"loss": 0.5})
    # Flushed: a run that is killed here has written the line.
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "split": "train", "loss": 0.5}
    ]
    file.close()
