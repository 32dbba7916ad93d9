"""What is refused or left out before the first step, and what is in the way of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.train import main
from tests.conftest import make_pairs, write_id_rows, write_rows
from tests.helpers.quiet_training import flags


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "has no rows"),
        ('{"prompt": "a"', "rows.jsonl:7: invalid JSON"),
        ('{"prompt": "a", "chosen": "b"}', "rows.jsonl:7: the row has no 'rejected'"),
    ],
)
def test_bad_rows_are_named(
    settings: dict[str, Any], tmp_path: Path, line: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = '{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}\n'
    (tmp_path / "rows.jsonl").write_text(6 * good + line + "\n" if line else "")
    argv = flags(settings)
    assert main([*argv, "--data", str(tmp_path / "rows.jsonl")]) == 2
    assert expected in capsys.readouterr().err


def test_an_adapter_path_that_is_a_file(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    argv = flags(settings)
    assert main([*argv, "--adapter-path", str(tmp_path / "file")]) == 2
    assert "a file; give a folder" in capsys.readouterr().err


def test_a_token_outside_the_vocabulary(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt_ids": [1], "chosen_ids": [259], "rejected_ids": [3]}])
    argv = flags(settings)
    assert main([*argv, "--data", str(path)]) == 2
    assert "rows.jsonl:1: token id 259 is outside the model's vocabulary of 259" in capsys.readouterr().err


def test_bad_rows_are_left_out_and_listed(
    settings: dict[str, Any], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data / "train.jsonl"
    path.write_text(path.read_text() + '{"prompt": \n{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}\n')
    assert main(flags(settings)) == 2
    assert f"{path}:7: invalid JSON" in capsys.readouterr().err
    assert main([*flags(settings), "--skip-bad-rows"]) == 0
    out = capsys.readouterr().out
    assert "train: 6 pairs from" in out
    assert "1 left out: not a usable row, 1 left out: chosen and rejected are the same tokens" in out
    folder = Path(settings["adapter_path"])
    first, second = (folder / "left_out.txt").read_text().splitlines()
    assert first.startswith(f"{path}:7: invalid JSON")
    assert second == f"{path}:8: chosen and rejected are the same tokens."
    record = json.loads((folder / "run.json").read_text())["data"]["train"]
    assert (record["rows"], record["pairs"], record["shape"]) == (8, 6, "token ids")
    assert record["left_out"] == {"bad_row": 1, "equal_sides": 1}
    write_id_rows(path, make_pairs(6))
    assert main(flags(settings)) == 0
    assert not (folder / "left_out.txt").exists()


def test_what_is_in_the_way_of_results_is_said_before_anything_is_trained(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(settings["adapter_path"])
    # What a run writes is known from one that wrote it.
    with_report = {name: value for name, value in settings.items() if name != "report"}
    assert main(flags({**with_report, "iters": 1})) == 0
    written = {path.name: path.is_dir() for path in folder.iterdir() if path.name != "train.lock"}
    assert {"adapters.safetensors", "report.html", "metrics.jsonl", "checkpoints"} <= written.keys()
    capsys.readouterr()
    for name, holds_files in written.items():
        other = folder.with_name(f"in the way of {name}")
        other.mkdir()
        (other / name).touch() if holds_files else (other / name).mkdir()
        assert main(flags({**settings, "adapter_path": str(other), "model": "not read"})) == 2
        printed = capsys.readouterr()
        assert f"{other / name}: is {'no' if holds_files else 'a'} folder, where a run" in printed.err
        assert printed.out == ""
    earlier = folder / "checkpoints" / "step-0000001"
    (folder / "best").mkdir()
    assert main(flags(settings)) == 2
    assert f"{folder / 'best'}: is a folder, where a run has a link" in capsys.readouterr().err
    assert earlier.is_dir()
    deep = {**settings, "adapter_path": "a/" * 1500}
    assert main(flags(deep)) == 2
    assert capsys.readouterr().err.count("\n") == 1
