"""Files of lines that a resumed run continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_mlx.errors import TrainingError
from orpo_mlx.reporting.resumable_jsonl import LineFile


def rows(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_what_comes_after_a_mark_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    file = LineFile(path)
    file.append([{"n": 1}, {"n": 2}])
    mark = file.mark()
    file.append([{"n": 3}])
    file.close()
    assert rows(path) == [1, 2, 3]
    with path.open("a") as torn:
        torn.write('{"n": 4')
    again = LineFile(path, mark)
    assert rows(path) == [1, 2]
    again.append([{"n": 5}])
    again.sync()
    again.close()
    assert rows(path) == [1, 2, 5]
    new = LineFile(path)
    new.close()
    assert rows(path) == []


@pytest.mark.parametrize("content", ["", '{"n": 1}\n', '{"n": 1}\n{"n": 7}\n{"n": 3}\n'])
def test_a_file_that_does_not_begin_as_it_should_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lines.jsonl"
    file = LineFile(path)
    file.append([{"n": 1}, {"n": 2}])
    mark = file.mark()
    file.close()
    path.write_text(content)
    with pytest.raises(TrainingError, match="its first 18 bytes are not those that were written before"):
        LineFile(path, mark)
    assert path.read_text() == content
    path.unlink()
    LineFile(path, mark).close()
    assert path.read_text() == ""


def test_what_json_does_not_have_is_not_written(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "lines.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.append([{"n": 1}, {"n": float("nan")}])
    file.close()
    assert (tmp_path / "lines.jsonl").read_text() == ""
