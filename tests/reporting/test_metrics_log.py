"""metrics.jsonl read back, as a run leaves it and as a crash does."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_mlx.errors import DataError
from orpo_mlx.reporting.metrics_log import Sample, read_run, read_samples

LINES = """\
{"step": 0, "split": "valid", "loss": 2.5, "accuracies/mean_logps": 0.5}
{"step": 1, "split": "train", "loss": 2.0, "new key": 7, "words": "text", "flag": true, "list": [1]}
{"step": 2, "split": "train", "loss": NaN, "other": 3}

{"step": 3, "split": "train", "loss": 1.5}
{"step": 3, "split": "train", "loss": 1.25}
[1, 2]
{"step": "4", "split": "train", "loss": 1}
{"split": "train", "loss": 1}
\x00\x00\x00
{"step": 4, "split": "tra"""


def test_what_is_a_report_is_read_and_the_rest_counted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINES)
    run = read_run(tmp_path)
    assert run.name == tmp_path.name
    assert run.unread == 5
    # The later of two reports of step 3 holds; a loss that is no number is not drawn.
    assert run.points("train", "loss") == [(1, 2.0), (3, 1.25)]
    assert run.points("train", "new key") == [(1, 7.0)]
    assert run.reports["train"][1] == {"loss": 2.0, "new key": 7.0}
    assert (run.points("valid", "loss")[0][1], run.points("train", "loss")[-1][1]) == (2.5, 1.25)
    assert run.points("test", "loss") == []


@pytest.mark.parametrize(
    ("text", "expected"), [(None, "cannot be read"), ("", "no report yet"), ("{", "no report yet")]
)
def test_nothing_to_read_is_one_sentence(tmp_path: Path, text: str | None, expected: str) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=expected):
        read_run(tmp_path)


def test_samples_are_read_prompt_by_prompt_and_what_is_none_is_passed_over(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == []
    text = """\
{"step": 0, "prompt": "b", "text": "x", "tokens": 1}
{"step": 0, "prompt": "a", "text": "y", "tokens": 2}
{"step": 5, "prompt": "b", "text": "z", "tokens": 3}
{"step": "five", "prompt": "b", "text": "z", "tokens": 3}
{"step": 5, "prompt": "b"}
[]
{"step": 5, "pro"""
    (tmp_path / "samples.jsonl").write_text(text)
    assert read_samples(tmp_path) == [Sample(0, "b", "x", 1), Sample(5, "b", "z", 3), Sample(0, "a", "y", 2)]
