"""`iterate`, `pairs` and `evaluate` as processes that are killed with SIGKILL in the middle of their work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.kill_rounds import OUTPUTS, different_files, disturbed, prepare


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
def test_what_was_killed_at_random_moments_ends_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    found = disturbed(prepare(tmp_path)[name], tmp_path, OUTPUTS[name], kills=3, seed=1)
    assert found.kills == 3
    assert found.different == []


def test_a_file_that_differs_is_seen(tmp_path: Path) -> None:
    for name, content in (("whole", "a"), ("cut", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.jsonl").write_text("x")
        (tmp_path / name / "other.jsonl").write_text(content)
    (tmp_path / "cut" / "more.json").write_text("{}")
    assert different_files(tmp_path / "whole", tmp_path / "cut") == ["more.json", "other.jsonl"]
