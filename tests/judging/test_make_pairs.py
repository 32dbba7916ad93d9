"""Pairs made of samples: what is left out, and runs that are killed anywhere."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_mlx.data.pairs import Reading, load_pairs
from orpo_mlx.data.prompts import Prompt, read_prompt
from orpo_mlx.errors import ConfigError, TrainingError
from orpo_mlx.files import save_json
from orpo_mlx.judging import make_pairs as module
from orpo_mlx.judging.judges.judges import make_judge
from orpo_mlx.judging.judges.verdicts import FIRST, SECOND, TIE, Question, Verdict
from orpo_mlx.judging.make_pairs import PairPlan, make_pairs, samples_file, score, state_file
from orpo_mlx.judging.ranking import LEFT_OUT, Sample, Scored, different, make_rows, summary
from orpo_mlx.judging.requests import Sampling, Side
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.resumable_jsonl import LineFile
from orpo_mlx.types import Group, Pair
from tests.conftest import write_rows

TURNS = read_prompt({"prompt": [{"role": "user", "content": "Q?"}], "tools": [{"name": "t"}]}, "f:1")
QUIET = Reporter(Console(quiet=True))


def scored(*each: tuple[str, bool, float]) -> list[Scored]:
    return [Scored(Sample(text, finished, number), value) for number, (text, finished, value) in enumerate(each)]


def test_samples_that_repeat_are_counted_and_the_finished_one_is_kept() -> None:
    counts: Counter[str] = Counter()
    found = different(
        [Sample("a", False), Sample("", True), Sample("a", True), Sample("b", True), Sample("b", True)], counts
    )
    assert found == [Sample("a", True), Sample("b", True)]
    assert counts == {"duplicates": 2, "empty": 1}


@pytest.mark.parametrize(
    ("samples", "gap", "reason"),
    [
        (scored(("a", True, 1.0)), 0.0, "no_contrast"),
        (scored(("a", False, 1.0), ("b", False, 0.0)), 0.0, "none_finished"),
        (scored(("a", True, 1.0), ("b", True, 1.0)), 0.0, "near_ties"),
        (scored(("a", True, 1.0), ("b", True, 0.8)), 0.3, "near_ties"),
        # The best was cut off, and of those that are no better nothing can be learnt.
        (scored(("a", False, 1.0), ("b", True, 0.0)), 0.0, "near_ties"),
    ],
)
def test_prompts_without_a_pair_are_counted(samples: list[Scored], gap: float, reason: str) -> None:
    counts: Counter[str] = Counter()
    assert make_rows(TURNS, samples, "pairs", gap, {}, counts) == []
    assert counts[reason] == 1
    assert LEFT_OUT[reason] in summary(counts)


@pytest.mark.parametrize("form", ["pairs", "groups"])
def test_rows_are_what_training_reads(form: str, tmp_path: Path) -> None:
    samples = scored(("worst", False, 0.1), ("best", True, 0.9), ("middle", True, 0.5))
    prompts = [TURNS, read_prompt({"prompt": "Q?"}, "f:2")]
    rows = [row for each in prompts for row in make_rows(each, samples, form, 0.0, {"judge": "j"}, Counter())]
    assert rows[0]["provenance"] == {"judge": "j", "samples": [1, 0] if form == "pairs" else [1, 2]}
    assert rows[0]["tools"] == [{"name": "t"}]
    for read, prompt in zip(load_pairs(write_rows(tmp_path / "r.jsonl", rows), Reading()), prompts, strict=True):
        assert isinstance(read, Pair | Group)
        assert (read.prompt, read.tools) == (prompt.pair.prompt, prompt.pair.tools)
        if isinstance(read, Pair):
            assert read.margin == pytest.approx(0.8)
            assert "best" in str(read.chosen)
            assert "worst" in str(read.rejected)
        else:
            assert read.scores == (0.9, 0.5)


def test_a_model_that_judges_scores_against_the_first_sample_in_both_orders() -> None:
    class Judge:
        name = identity = "scripted"
        fair = False

        def __call__(self, questions: Sequence[Question], progress: Callable[[int], None]) -> list[Verdict]:
            return [self.verdict(question) for question in questions]

        def verdict(self, question: Question) -> Verdict:
            if "broken" in (question.first, question.second):
                return Verdict(None, "unreadable")
            lengths = len(question.first), len(question.second)
            return Verdict(TIE if lengths[0] == lengths[1] else FIRST if lengths[0] < lengths[1] else SECOND)

    counts: Counter[str] = Counter()
    samples = [Sample(text, True) for text in ("four", "six...", "two", "broken", "five")]
    prompts = [read_prompt({"prompt": str(number)}, "f:1") for number in range(2)]
    first, second = score(Judge(), prompts, [samples, [Sample("alone", True)]], counts)
    assert [(each.sample.text, each.score) for each in first] == [
        ("four", 0.5),
        ("six...", 0),
        ("two", 1),
        ("five", 0.5),
    ]
    assert [each.score for each in second] == [0.5]
    assert counts == {"unjudged": 1}


class CutOffError(Exception):
    """Where a run is cut off."""


def plan(model_folder: Path, **changes: Any) -> PairPlan:
    judge = make_judge("rule:length=1-2")
    return PairPlan(Side(str(model_folder)), judge, Sampling(50, 1.0), samples=6, rows=36)._replace(**changes)


def prompts() -> list[Prompt]:
    return [read_prompt({"prompt": f"Say {number % 36}."}, f"f:{number}") for number in range(40)]


def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = make_pairs(plan(model_folder), prompts(), whole, QUIET)
    assert expected.prompts == 36
    assert 0 < expected.rows <= 36
    left = sum(expected.left_out.get(name, 0) for name in ("no_contrast", "near_ties", "none_finished"))
    assert expected.rows + left == 36
    monkeypatch.setattr(module, "_JUDGED_TOGETHER", 16)
    calls = 0

    def killed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            # Before and after what a run does to its files, in turn, at ever later moments.
            if calls % 5 == 2:
                raise CutOffError
            result = real(*args, **more)
            if calls % 5 == 4:
                raise CutOffError
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(LineFile, "append", killed(LineFile.append))
        patch.setattr(module, "save_json", killed(save_json))
        attempts = 0
        found = None
        while found is None:
            attempts += 1
            with suppress(CutOffError):
                found = make_pairs(plan(model_folder), prompts(), cut, QUIET)
    assert attempts > 5
    assert found == expected
    assert cut.read_bytes() == whole.read_bytes()
    assert samples_file(cut).read_bytes() == samples_file(whole).read_bytes()
    # Done is done: nothing is loaded or drawn again.
    monkeypatch.setattr(module, "load_side", None)
    assert make_pairs(plan(model_folder), prompts(), cut, QUIET) == expected


def test_what_was_removed_is_made_again_and_what_was_added_stays(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pairs.jsonl"
    expected = make_pairs(plan(model_folder), prompts(), output, QUIET)
    whole, drawn = output.read_bytes(), samples_file(output).read_bytes()
    assert expected.rows
    said = Reporter(Console(width=200))
    for removed in ([output], [output, samples_file(output)]):
        for path in removed:
            path.unlink()
        assert make_pairs(plan(model_folder), prompts(), output, said) == expected
        assert output.read_bytes() == whole
        assert samples_file(output).read_bytes() == drawn
        text = capsys.readouterr().out.replace("\n", "")
        assert f"{output} is gone: 36 prompts are judged again." in text
        assert ("the samples are drawn again" in text) == (len(removed) == 2)
    # Finished, nothing of a user's is cut off, and the samples are needed no more.
    output.write_bytes(whole + b'{"mine": 1}\n')
    samples_file(output).unlink()
    assert make_pairs(plan(model_folder), prompts(), output, QUIET) == expected
    assert output.read_bytes() == whole + b'{"mine": 1}\n'
    output.write_bytes(whole[1:])
    with pytest.raises(TrainingError, match="are not those that were written before"):
        make_pairs(plan(model_folder), prompts(), output, QUIET)


class Server:
    """A judge that another process is, and that is gone for a while."""

    name = identity = "a server"
    fair = False
    lost = False
    down = range(0)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, questions: Sequence[Question], progress: Callable[[int], None]) -> list[Verdict]:
        self.calls += 1
        self.lost = self.calls in self.down
        lengths = [(len(each.first), len(each.second)) for each in questions]
        failure = Verdict(None, "refused")
        return [failure if self.lost else Verdict(FIRST if a < b else SECOND if a > b else TIE) for a, b in lengths]


def test_a_judge_that_is_gone_for_a_while_changes_nothing(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_JUDGED_TOGETHER", 8)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = make_pairs(plan(model_folder, judge=Server()), prompts(), whole, QUIET)
    assert expected.rows
    gone = Server()
    # Both orders of a group are a call each: in the midst of the second and of the third group.
    gone.down = range(4, 5)
    with pytest.raises(TrainingError, match="a server`: has stopped answering; what was judged before is saved"):
        make_pairs(plan(model_folder, judge=gone), prompts(), cut, QUIET)
    assert 0 < len(cut.read_bytes()) < len(whole.read_bytes())
    assert make_pairs(plan(model_folder, judge=gone), prompts(), cut, QUIET) == expected
    assert cut.read_bytes() == whole.read_bytes()


def test_a_run_goes_on_only_with_its_own_settings(tmp_path: Path, model_folder: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    make_pairs(plan(model_folder), prompts()[:4], output, QUIET)
    other = plan(model_folder, judge=make_judge("rule:plain"))
    with pytest.raises(ConfigError, match="was begun with another judge; give `overwrite`"):
        make_pairs(other, prompts()[:4], output, QUIET)
    answered = [each._replace(reference="yes") for each in prompts()[:4]]
    with pytest.raises(ConfigError, match="was begun with another prompts"):
        make_pairs(plan(model_folder), answered, output, QUIET)
    make_pairs(other, prompts()[:4], output, QUIET, overwrite=True)
    assert json.loads(state_file(output).read_text())["identity"]["judge"] == "rule:plain"
    state_file(output).unlink()
    with pytest.raises(ConfigError, match="exists already"):
        make_pairs(other, prompts()[:4], output, QUIET)
