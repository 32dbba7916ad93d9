"""`orpo-mlx evaluate` on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.evaluate import main
from tests.conftest import write_model_folder, write_rows
from tests.helpers.tuned_adapters import ANSWER, PROMPT

JUDGE = ("--judge", f"rule:regex=^{ANSWER}")


@pytest.fixture
def adapters(taught_adapters: Path) -> Path:
    return taught_adapters


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": PROMPT}] * 3 + [{"prompt": PROMPT + "!"}])


def run(tmp_path: Path, *argv: str, status: int = 0) -> dict[str, Any]:
    out, replies = tmp_path / "out.json", tmp_path / "replies.jsonl"
    assert main([*argv, "--max-tokens", "8", "--json", str(out), "--replies", str(replies)]) == status
    found: dict[str, Any] = json.loads(out.read_text())
    assert len(replies.read_text().splitlines()) == found["prompts"]
    return found


def test_the_tuned_model_wins_against_its_base(
    tmp_path: Path, adapters: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, "--adapter-path", str(adapters), "--data", str(prompts), *JUDGE)
    assert (found["prompts"], found["distinct_prompts"], found["judge_failures"]) == (4, 2, 0)
    assert found["wins"] >= 3
    assert found["kl"]["per_reply"] > 0
    assert found["candidate"]["finished"] >= 0.75
    assert found["interval"][0] < found["win_rate"]
    assert "win rate" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert rows[0]["candidate"] == ANSWER
    assert rows[0]["preference"] == 1


def test_two_models_are_compared_in_turn_and_give_the_same_replies(
    tmp_path: Path, adapters: Path, prompts: Path
) -> None:
    other = write_model_folder(tmp_path / "copy")
    shared = run(tmp_path, "--adapter-path", str(adapters), "--data", str(prompts), *JUDGE)
    apart = run(
        tmp_path, "--adapter-path", str(adapters), "--baseline-model", str(other), "--data", str(prompts), *JUDGE
    )
    assert apart["kl"] is None
    assert apart["baseline"]["mean_tokens"] == shared["baseline"]["mean_tokens"]
    assert apart["win_rate"] == shared["win_rate"]


def test_a_judge_that_says_nothing_useful_ends_in_counts_and_one_sentence(
    tmp_path: Path, adapters: Path, prompts: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--adapter-path", str(adapters), "--data", str(prompts), "--judge", str(model_folder))
    found = run(tmp_path, *argv, "--check-judge", "rule:plain", status=2)
    assert found["win_rate"] is None
    assert found["judge_failures"] == 4
    assert found["win_rate_bounds"] == [0, 1]
    error = capsys.readouterr().err
    assert "4 of 4 judgements failed: 4 was given more than its context holds; there is no win rate" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--judge", "rule:plane"), "--judge rule:plane: no rule 'plane'; did you mean plain?"),
        (("--judge", "rule:plain", "--temp", "-1"), "--temp: found -1.0"),
        (("--judge", "rule:plain", "--top-p", "0.9"), "--top-p 0.9: --temp 0 draws nothing"),
        (("--judge", "rule:plain", "--judge-tokens", "9"), "--judge-tokens 9: is for a model that writes its verdict"),
        (
            ("--judge", "rule:plain", "--judge-timeout", "9"),
            "--judge-timeout 9.0: is for a server, and --judge rule:pl",
        ),
        (("--judge", "rule:plain", "--judge-model", "m"), "--judge-model m: is for a server, and --judge rule:plain i"),
        (("--judge", "rule:plain", "--baseline-adapter", "nowhere"), "--baseline-adapter nowhere: holds no"),
        (("--judge", "rule:exact"), "--judge rule:exact: 4 of 4 rows have no right answer"),
        (("--judge", "rule:plain", "--check-judge", "rule:exact"), "--check-judge rule:exact: 4 of 4 rows have no"),
        (("--judge", "http://"), "--judge http://: is no address"),
        (("--judge", "http://127.0.0.1:1/v1"), "--judge http://127.0.0.1:1/v1: could not be reached"),
        (("--judge", "rule:plain", "--json", "/nowhere/x.json"), "--json /nowhere/x.json: cannot be written there"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    argv: tuple[str, ...], message: str, adapters: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--adapter-path", str(adapters), "--data", str(prompts), "--max-tokens", "2", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_model_is_not_compared_with_itself(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "m", "--data", str(prompts), "--judge", "rule:plain"]) == 2
    assert "are the same model: give --adapter-path" in capsys.readouterr().err
