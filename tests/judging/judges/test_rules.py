"""Rules against what they say, and against the demo task that one of them is written for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.judging.judges.rules import make_rule
from orpo_mlx.judging.judges.scorer import Asked
from orpo_mlx.judging.judges.verdicts import FIRST, SECOND, TIE, Question, ballots

DATA = Path(__file__).resolve().parents[3] / "data"


def test_the_demos_rule_prefers_the_chosen_side_of_every_pair() -> None:
    rule = make_rule("rule:plain")
    questions = []
    for split in ("train", "valid", "test"):
        for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = {name: turns[0]["content"] for name, turns in json.loads(line).items()}
            questions.append(Question(row["prompt"], row["rejected"], row["chosen"]))
    assert len(questions) == 940
    assert {verdict.winner for verdict in rule(questions, lambda done: None)} == {SECOND}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("Paris.", "The capital of France is Paris."),
        ("Paris is the capital of France.", "Sure! Paris is the capital of France."),
        ("Paris is the capital.", "Paris is the capital. It is old. It is large. It is on a river."),
        ("Paris is the capital.", "**Paris** is the capital."),
        ("Paris is the capital.", "- Paris\n- the capital"),
        ("Paris is the capital.", ""),
        ("The capital of France is Paris.", "The capital of France, which is a country, would be the capital."),
    ],
)
def test_plain_prefers_the_answer_first_and_nothing_around_it(better: str, worse: str) -> None:
    rule = make_rule("rule:plain")
    question = "What is the capital of France?"
    assert rule.score(Asked(better, question, None)) > rule.score(Asked(worse, question, None))
    (ballot,) = ballots(rule, [Question(question, worse, better)])
    assert ballot.preference == 1
    assert ballot.consistent


@pytest.mark.parametrize(
    ("rule", "first", "second", "winner"),
    [
        ("rule:regex=^Yes", "Yes, it is.", "It is, yes.", FIRST),
        ("rule:regex=^Yes", "No.", "It is, yes.", TIE),
        ("rule:length=3", "one two three", "one two three four", FIRST),
        ("rule:length=2-3", "one", "one two", SECOND),
        ("rule:length=2-3", "one two", "one two three", TIE),
        ("rule:json", "{not json", '{"a": 1}', SECOND),
        ("rule:json=a,b", '{"a": 1, "b": 2}', '{"a": 1}', FIRST),
        ("rule:json=a", "[1]", "[" * 100_000, TIE),
        ("rule:exact", "The  answer.", "an answer", FIRST),
    ],
)
def test_rules_say_who_wins(rule: str, first: str, second: str, winner: str) -> None:
    (verdict,) = make_rule(rule)([Question("Q", first, second, "the answer")], lambda done: None)
    assert verdict.winner == winner


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rule:plane", "did you mean plain?"),
        ("rule:regex=(", "no regular expression"),
        ("rule:regex", "expected a regular expression"),
        ("rule:length=9-2", "expected words at most"),
        ("rule:length", "expected words at most"),
        ("rule:exact=x", "takes no argument"),
    ],
)
def test_names_that_are_no_rule_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as caught:
        make_rule(name)
    assert name in str(caught.value)


def test_a_rule_that_needs_the_right_answer_says_how_many_rows_have_none() -> None:
    questions = [Question("Q", "a", "b", "a"), Question("Q", "a", "b")]
    with pytest.raises(DataError, match="1 of 2 rows have no right answer"):
        make_rule("rule:exact")(questions, lambda done: None)
