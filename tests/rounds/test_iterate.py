"""Rounds on a tiny model, killed wherever they write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import orpo_mlx.files
from orpo_mlx.cli.iterate import main
from orpo_mlx.errors import ConfigError, DataError, TrainingError, UserError
from orpo_mlx.judging.judges.verdicts import FIRST, SECOND, TIE, Question, Verdict
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.rounds.iterate import RECORD, Rounds, iterate
from orpo_mlx.rounds.settings import RoundsConfig, rounds_config
from tests.conftest import CHAT_TEMPLATE, SMALL, write_model_folder, write_rows
from tests.helpers.kill_and_resume import adapters, metrics

QUIET = Reporter(Console(quiet=True))


def config(tmp_path: Path, model_folder: Path, **changes: Any) -> RoundsConfig:
    data = tmp_path / "prompts"
    rows = [{"prompt": f"<script>alert({number})</script> Say {number}."} for number in range(8)]
    write_rows(data / "train.jsonl", rows)
    write_rows(data / "test.jsonl", rows[:4])
    train = {**SMALL, "model": str(model_folder), "save_every": 2, "samples": 0}
    table = {
        **{"data": str(data), "judge": "rule:length=1", "rounds": 2, "samples": 5, "rows": 20, "max_tokens": 24},
        **{"least_gain": -1, "train": train},
    }
    return rounds_config({**table, **changes}, "test")


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on kills."""
    record = json.loads((folder / RECORD).read_text())
    for each in record["rounds"]:
        del each["training"]["training_seconds"]
        for side in ("baseline", "candidate"):
            each["evaluation"][side].pop("adapter")
    rounds = [folder / f"round-{number}" for number in range(1, 1 + len(record["rounds"]))]
    pairs = [(folder / f"{each.name}-pairs" / "train.jsonl").read_text().replace(str(folder), "") for each in rounds]
    weights = [{name: value.tobytes() for name, value in adapters(each).items()} for each in rounds]
    return {
        "rounds": record["rounds"],
        "pairs": pairs,
        "weights": weights,
        "metrics": [metrics(each) for each in rounds],
    }


class KilledError(BaseException):
    """Neither caught nor tidied up after, as a SIGKILL."""


@pytest.mark.slow
def test_rounds_killed_at_any_write_end_with_the_same_result(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path, model_folder)
    record = iterate(made, tmp_path / "whole", QUIET)
    assert record["stopped"] == "all rounds are done"
    assert [each["round"] for each in record["rounds"]] == [1, 2]
    writes = 0

    def killed(path: Path, write: Callable[[Path], object]) -> None:
        nonlocal writes
        writes += 1
        if writes % 11 == 5:
            raise KilledError
        real(path, write)
        if writes % 11 == 9:
            raise KilledError

    real = orpo_mlx.files.write_atomically
    kills = 0
    with monkeypatch.context() as patch:
        patch.setattr(orpo_mlx.files, "write_atomically", killed)
        while True:
            try:
                iterate(made, tmp_path / "cut", QUIET)
                break
            except KilledError:
                kills += 1
    assert kills > 4
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    # Done is done, and other settings need another folder.
    assert iterate(made, tmp_path / "cut", QUIET)["stopped"] == "all rounds are done"
    with pytest.raises(ConfigError, match="holds rounds of another samples; give another folder"):
        iterate(config(tmp_path, model_folder, samples=4), tmp_path / "cut", QUIET)


def test_rounds_end_where_nothing_is_gained(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(tmp_path, model_folder, rounds=5, least_gain=1, samples=4)
    record = iterate(made, tmp_path / "out", QUIET)
    assert record["stopped"] == "the win rate rose by less than 1"
    assert len(record["rounds"]) == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(0)" in page
    assert (tmp_path / "out" / "report.png").stat().st_size > 1000
    path = tmp_path / "c.yaml"
    path.write_text("data: nowhere\njudge: rule:plain\n")
    assert main(["-c", str(path), "--output", str(tmp_path / "no")]) == 2
    error = capsys.readouterr().err
    assert "nowhere: no such file or folder" in error
    assert len(error.splitlines()) == 1


def test_a_judge_that_cannot_judge_the_last_prompts_is_refused_before_the_first(
    tmp_path: Path, model_folder: Path
) -> None:
    made = config(tmp_path, model_folder, judge="rule:exact")
    write_rows(tmp_path / "prompts" / "train.jsonl", [{"prompt": "One?", "completion": "1"}])
    with pytest.raises(DataError, match=r"4 of 5 rows have no right answer, the first of them .*test\.jsonl:1"):
        iterate(made, tmp_path / "out", QUIET)
    assert not (tmp_path / "out" / RECORD).exists()


FULL = {"fine_tune_type": "full", "reference": "base", "method": "dpo"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"save_best": True}, "train, round 1: `save_best` goes by the validation loss: the pairs of a round have no"),
        ({"patience": 2}, "train, round 1: `patience` goes by the validation loss"),
        ({"reference": "copy", "method": "dpo"}, "train, round 2: `reference=copy`: a resumed run no longer loads"),
        (FULL, "train, round 2: `reference=base`: with `fine_tune_type=full`"),
        ({"reference": "nowhere", "method": "dpo"}, "nowhere"),
        ({"lr_schedule": {"name": "no"}}, "train, round 1: "),
    ],
)
def test_a_training_that_would_be_refused_is_refused_before_anything_is_sampled(
    tmp_path: Path, model_folder: Path, changes: dict[str, Any], expected: str
) -> None:
    made = config(tmp_path, model_folder)
    with pytest.raises(UserError) as caught:
        iterate(dataclasses.replace(made, train={**made.train, **changes}), tmp_path / "out", QUIET)
    assert expected in str(caught.value)
    assert not (tmp_path / "out" / RECORD).exists()
    # What is refused in the second round alone is none where there is no second one.
    if "round 2" in expected:
        Rounds(dataclasses.replace(made, rounds=1, train={**made.train, **changes}), tmp_path / "out", QUIET)


def test_a_prompt_that_the_chat_template_refuses_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    refused = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('refused') }}{% endif %}"
    made = config(tmp_path, write_model_folder(tmp_path / "model", template=refused + CHAT_TEMPLATE))
    write_rows(tmp_path / "prompts" / "test.jsonl", [{"prompt": "yes"}, {"prompt": "no"}])
    with pytest.raises(DataError, match=r"test\.jsonl:2"):
        iterate(made, tmp_path / "out", QUIET)
    assert not (tmp_path / "out" / RECORD).exists()


class Shorter:
    """Prefers the shorter reply, as long as it is there."""

    name = identity = "a server"
    fair = False
    lost = False

    def __call__(self, questions: Sequence[Question], progress: Callable[[int], None]) -> list[Verdict]:
        if self.lost:
            return [Verdict(None, "refused")] * len(questions)
        lengths = [(len(each.first), len(each.second)) for each in questions]
        return [Verdict(FIRST if a < b else SECOND if a > b else TIE) for a, b in lengths]


def test_a_judge_that_goes_away_ends_no_rounds(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path, model_folder, rounds=1)
    server = Shorter()
    monkeypatch.setattr(RoundsConfig, "make_judge", lambda self: server)
    trained = Rounds.train

    def gone_after_training(self: Rounds, number: int) -> dict[str, Any]:
        found = trained(self, number)
        server.lost = True
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Rounds, "train", gone_after_training)
        with pytest.raises(TrainingError, match="has stopped answering"):
            iterate(made, tmp_path / "out", QUIET)
    server.lost = False
    record = iterate(made, tmp_path / "out", QUIET)
    assert record["stopped"] == "all rounds are done"
    assert record["rounds"][0]["evaluation"]["judge_failures"] == 0
