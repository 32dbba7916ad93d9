"""Comparisons summed up, and judges that are found out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from orpo_mlx.data.prompts import Prompt, read_prompt
from orpo_mlx.errors import UserError
from orpo_mlx.judging import evaluate as evaluating
from orpo_mlx.judging import make_pairs as pairing
from orpo_mlx.judging.calibration import PADDING, calibrate, cohens_kappa, findings
from orpo_mlx.judging.contest import by_category, compare_replies, figures, order_figures
from orpo_mlx.judging.judges.judges import make_judge
from orpo_mlx.judging.judges.rules import make_rule
from orpo_mlx.judging.judges.verdicts import FIRST, SECOND, TIE, Judge, Question, Verdict
from orpo_mlx.judging.requests import Sampling, Side
from orpo_mlx.reporting.console import Reporter


class Scripted:
    """A judge that does what a function says."""

    name = identity = "scripted"
    fair = False

    def __init__(self, verdict: Callable[[Question], Verdict]) -> None:
        self.verdict = verdict
        self.asked = 0

    def __call__(self, questions: Sequence[Question], progress: Callable[[int], None]) -> list[Verdict]:
        self.asked += len(questions)
        return [self.verdict(question) for question in questions]


def prompts(count: int) -> list[Prompt]:
    rows: list[dict[str, Any]] = [
        {"prompt": f"What is {n}?", "subset": "even" if n % 2 == 0 else "odd"} for n in range(count)
    ]
    return [read_prompt(row, f"made:{number}") for number, row in enumerate(rows)]


def better(question: Question) -> Verdict:
    """Right: the reply with "good" in it."""
    good = ["good" in text for text in (question.first, question.second)]
    return Verdict(TIE if good[0] == good[1] else FIRST if good[0] else SECOND)


def first(question: Question) -> Verdict:
    return Verdict(FIRST)


def longer(question: Question) -> Verdict:
    gap = len(question.first) - len(question.second)
    return Verdict(TIE if gap == 0 else FIRST if gap > 0 else SECOND)


BASE = ["it is bad"] * 10
TUNED = ["it is good"] * 6 + ["it is bad"] * 2 + ["so so"] * 2


def test_wins_losses_and_ties_are_counted_and_equal_replies_are_not_asked_about() -> None:
    judge = Scripted(better)
    found = figures(compare_replies(judge, prompts(10), BASE, TUNED))
    assert (found["wins"], found["losses"], found["ties"], found["identical_replies"]) == (6, 0, 4, 2)
    assert found["win_rate"] == pytest.approx(0.8)
    assert judge.asked == 2 * 8
    low, high = found["interval"]
    assert low < 0.8 < high
    assert found["judge_failures"] == 0
    assert found["win_rate_bounds"] == [0.8, 0.8]


def test_a_judge_of_the_first_answer_gives_half_and_is_found_out() -> None:
    judge: Judge = Scripted(first)
    judged = compare_replies(judge, prompts(10), BASE, TUNED)
    found = figures(judged)
    assert (found["win_rate"], found["ties"]) == (0.5, 10)
    trust = calibrate(judge, judged, make_rule("rule:regex=good"))
    assert trust["order"]["first_preferred"]["share"] == 1
    assert trust["order"]["consistent"] == 0
    assert trust["identical"] == {"asked": 10, FIRST: 10, SECOND: 0, TIE: 0, "failures": 0}
    said = " ".join(findings(trust))
    assert "prefers the first answer: 100%" in said
    assert "10 better as the first" in said
    assert "longer" not in said


def test_a_judge_of_length_is_found_out_and_controlled() -> None:
    judge: Judge = Scripted(longer)
    tuned = [f"it is bad{' and so on' * (number % 4)}" for number in range(40)]
    judged = compare_replies(judge, prompts(40), ["it is bad and so on"] * 40, tuned)
    found = figures(judged)
    assert found["length_coefficient"] > 0.5
    said = " ".join(findings(calibrate(judge, judged)))
    assert "prefers longer answers: 100%" in said
    assert "first answer" not in said
    assert len(PADDING) > 100


def test_a_good_judge_is_found_nothing_against() -> None:
    judge: Judge = Scripted(better)
    judged = compare_replies(judge, prompts(10), BASE, TUNED)
    trust = calibrate(judge, judged, make_rule("rule:regex=good"))
    assert findings(trust) == []
    assert trust["agreement"]["agreed"]["share"] == 1
    assert trust["agreement"]["kappa"] == 1
    assert order_figures(judged)["consistent"] == 1


@pytest.mark.parametrize(("failing", "rate"), [(4, True), (6, False)])
def test_failures_are_counted_and_too_many_leave_no_rate(failing: int, rate: bool) -> None:
    broken = {f"What is {number}?" for number in range(failing)}
    judge: Judge = Scripted(
        lambda question: Verdict(None, "unreadable") if question.prompt in broken else Verdict(SECOND)
    )
    found = figures(compare_replies(judge, prompts(10), ["a"] * 10, ["b"] * 10))
    assert found["judge_failures"] == failing
    assert found["failure_reasons"] == {"unreadable": failing}
    assert (found["win_rate"] is not None) is rate
    # Both orders say the second, so what is judged is a tie.
    assert found["win_rate_bounds"] == pytest.approx(
        [0.5 * (10 - failing) / 10, 0.5 * (10 - failing) / 10 + failing / 10]
    )


def test_figures_by_category() -> None:
    found = by_category(compare_replies(Scripted(better), prompts(10), BASE, TUNED))
    assert {name: each["prompts"] for name, each in found.items()} == {"even": 5, "odd": 5}
    assert found["even"]["wins"] + found["odd"]["wins"] == 6


def test_kappa_is_that_of_cohens_example() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: 0.4.
    both = [(FIRST, FIRST)] * 20 + [(FIRST, SECOND)] * 5 + [(SECOND, FIRST)] * 10 + [(SECOND, SECOND)] * 15
    assert cohens_kappa(both) == pytest.approx(0.4)
    assert cohens_kappa([(TIE, TIE)] * 3) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "`judge` ./nowhere: no such file or folder."),
        ("reward:./nowhere", "`judge=reward:./nowhere`: ./nowhere: no such file or folder."),
        ("rule:exact", "`judge=rule:exact`: 1 of 1 rows have no right answer"),
    ],
)
def test_a_judge_that_could_not_judge_says_so_before_replies_are_drawn(
    name: str, message: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("replies were drawn")

    monkeypatch.setattr(evaluating, "replies_of_both", drawn)
    monkeypatch.setattr(pairing, "draw_samples", drawn)
    judge, side, asked = make_judge(name), Side(str(model_folder)), prompts(1)
    with pytest.raises(UserError) as caught:
        evaluating.evaluate(evaluating.Plan(side, side, judge), asked, Reporter())
    assert str(caught.value).startswith(message)
    with pytest.raises(UserError) as caught:
        pairing.make_pairs(pairing.PairPlan(side, judge, Sampling(4)), asked, tmp_path / "o.jsonl", Reporter())
    assert str(caught.value).startswith(message)
    assert not list(tmp_path.glob("o.jsonl*"))


@pytest.mark.parametrize(
    ("agreed", "count", "said"),
    [
        ({"share": 0.5, "low": 0.3, "high": 0.7}, 20, "20 that both decide: little more than chance"),
        ({"share": 1.0, "low": 0.48, "high": 1.0}, 3, "3 that both decide: too few to tell from chance"),
        ({"share": 1.0, "low": 0.566, "high": 1.0}, 5, ""),
    ],
)
def test_agreement_is_little_or_hardly_measured(agreed: dict[str, float], count: int, said: str) -> None:
    agreement = {"rule": "rule:plain", "agreed": agreed, "both_decided": count}
    found = " ".join(findings({"order": {"first_preferred": None}, "agreement": agreement}))
    assert said in found
    assert bool(said) == bool(found)
