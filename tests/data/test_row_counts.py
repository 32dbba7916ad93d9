"""Counts of what became of rows."""

from __future__ import annotations

import json

from orpo_mlx.data.row_counts import MAX_SEQ_LENGTH, RowReport
from orpo_mlx.errors import DataError


def test_counts_first_places_and_words() -> None:
    report = RowReport(limit=f"{MAX_SEQ_LENGTH} 8")
    for line in range(15):
        report.drop("too_long", f"f:{line}")
    report.drop("bad_row", "f:20", DataError("f:20: nonsense."))
    report.note("with the prompt cut", "f:21")
    report.shapes.update(["a", "b", "a"])
    assert report.dropped == {"too_long": 15, "bad_row": 1}
    assert report.places["too_long"] == [f"f:{line}" for line in range(10)]
    assert len(report.left_out) == 16
    assert report.left_out[-1] == "f:20: nonsense."
    assert report.left_out[0] == "f:0: longer than `max_seq_length` 8."
    assert report.shape == "a + b"
    assert report.summary() == (
        ", 15 left out: longer than `max_seq_length` 8, 1 left out: not a usable row, 1 with the prompt cut"
    )


def test_it_comes_back_from_json() -> None:
    report = RowReport(limit="x 3", rows_read=3, rows_kept=2)
    report.drop("equal_sides", "f:1")
    again = RowReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report
    again.drop("equal_sides", "f:2")
    assert again.dropped == {"equal_sides": 2}
