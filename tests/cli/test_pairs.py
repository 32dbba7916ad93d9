"""`orpo-mlx pairs`, whose rows `train` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.pairs import main
from tests.conftest import write_rows
from tests.helpers.quiet_training import run_quietly


def argv(tmp_path: Path, model_folder: Path, *more: str) -> list[str]:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {number}."} for number in range(8)])
    common = ["--model", str(model_folder), "--data", str(prompts), "--judge", "rule:length=1", "--max-tokens", "8"]
    return [*common, "--samples", "4", "--output", str(tmp_path / "train.jsonl"), *more]


def test_pairs_are_made_and_trained_on(
    tmp_path: Path, model_folder: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv(tmp_path, model_folder)) == 0
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    said = capsys.readouterr().out
    assert f"{len(rows)} rows of 8 prompts" in said
    assert rows
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert rows[0]["provenance"]["judge"] == "rule:length=1"
    run_quietly(settings | {"data": str(tmp_path / "train.jsonl"), "iters": 1})


def test_what_cannot_be_is_one_sentence(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("--samples", "1"), "--samples: found 1, expected 2 or more"),
        (("--min-gap", "nan"), "--min-gap: found nan"),
        (("--top-p", "0"), "--top-p: found 0.0"),
        (("--min-gap", "1e9"), "no prompt gave a row; more --samples"),
        (("--seed", "3"), "was begun with another sampling, min_gap; give --overwrite"),
    ):
        assert main(argv(tmp_path, model_folder, *more)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
