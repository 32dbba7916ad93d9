"""The command line of `inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_mlx.cli.inspect import main
from tests.conftest import write_rows

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "chosen": ""}, {**GOOD, "prompt": "R"}])


def test_text_json_and_picture(
    tmp_path: Path, rows: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(rows), "--model", str(model_folder)]
    assert main([*command, "--png", str(tmp_path / "h.png")]) == 0
    text = capsys.readouterr().out
    assert "rows: 3 read, 2 kept, 2 pairs" in text
    assert f"left out: 1 empty_side ({rows}:2)" in text
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows_read"], figures["rows_kept"], figures["rows_dropped"]) == (3, 2, {"empty_side": 1})
    assert figures["shape"] == "strings, explicit prompt"
    assert main([*command, "--json", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text()) == figures


def test_labels_and_ratings_show_their_balance(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = [{"prompt": "Q", "completion": "A" * (1 + number), "label": number == 0} for number in range(5)]
    rated = [{"prompt": "Q", "completions": ["A", "B", "C"], "scores": [1, 2, 2]}]
    for name, rows, expected in (
        (
            "labelled",
            labelled,
            ["labels: 1 good, 4 bad (20.0% good)", "--desirable-weight 4 gives both the same weight"],
        ),
        ("rated", rated, ["completions: 3, 3 to 3 a row (median 3), in 2 pairs", "2         ⟦B"]),
        ("one kind", labelled[1:], ["there is no good completion"]),
    ):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        command = ["--data", str(path), "--model", str(model_folder), "--pairs", "adjacent"]
        assert main([*command, "--png", str(tmp_path / "h.png")]) == 0
        text = capsys.readouterr().out
        assert all(part in text for part in expected), text
        assert main([*command, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)["splits"]["train"]
        assert figures["completions"] == (3 if name == "rated" else len(rows))
        if name == "labelled":
            assert figures["labels"] == {"good": 1, "bad": 4, "proposal": {"desirable_weight": 4.0}}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--max-seq-length", "0"], "--max-seq-length: found '0', expected a whole number greater than 0"),
        (["--batch-size", "-1"], "--batch-size: found '-1'"),
        (["--truncate", "keep"], "--truncate: found 'keep', expected one of drop, keep_start, keep_end"),
        (["--columns", "x"], "--columns: found 'x', expected NAME=COLUMN"),
        (["--min-margin", "nan"], "--min-margin: found 'nan', expected a number"),
        (["--png", "/nowhere/x.png"], "--png /nowhere/x.png: cannot be written there"),
        (["--json", "/"], "--json /: cannot be written there"),
        (["--iters", "3"], "unrecognized arguments: --iters 3"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    rows: Path, model_folder: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["--data", str(rows), "--model", str(model_folder), *arguments])
    except SystemExit as left:
        status = int(str(left.code))
    assert status == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


def test_bad_rows_stop_it_or_are_counted(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {"prompt": 1}])
    command = ["--data", str(path), "--model", str(model_folder)]
    assert main(command) == 2
    assert f"{path}:2: the row has no 'chosen' and no 'rejected'" in capsys.readouterr().err
    assert main([*command, "--skip-bad-rows"]) == 0
    assert f"left out: 1 bad_row ({path}:2)" in capsys.readouterr().out
