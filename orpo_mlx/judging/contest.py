"""A candidate's replies against a baseline's, prompt by prompt, and the figures that come of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from orpo_mlx.data.prompts import Prompt, prompt_key
from orpo_mlx.errors import TrainingError
from orpo_mlx.judging.intervals import Interval
from orpo_mlx.judging.judges.rules import Rule
from orpo_mlx.judging.judges.verdicts import (
    FAILURES,
    FIRST,
    SECOND,
    TIE,
    Ballot,
    Judge,
    Loaded,
    Question,
    Remote,
    Verdict,
    ballots,
    check_references,
    count_failures,
)
from orpo_mlx.judging.win_rate import WinRate, mean_interval, win_rate

MOST_FAILED = 0.5
"""Share of the comparisons that may fail; with more there is no win rate, for what is left may be of one kind."""

_SAME = Ballot(Verdict(TIE), Verdict(TIE))


class Judged(NamedTuple):
    """Comparisons with their results, in the order of the prompts."""

    prompts: Sequence[Prompt]
    questions: Sequence[Question]
    """First the baseline's reply, second the candidate's."""
    ballots: Sequence[Ballot]

    @property
    def decided(self) -> list[int]:
        """Numbers of the comparisons that have a result."""
        return [number for number, ballot in enumerate(self.ballots) if ballot.failure is None]

    @property
    def preferences(self) -> list[float]:
        """How far the candidate is preferred, of those that have a result."""
        return [self.ballots[number].preference for number in self.decided]

    @property
    def clusters(self) -> list[tuple[Any, ...]]:
        """The prompt of each that has a result."""
        return [prompt_key(self.prompts[number]) for number in self.decided]

    def result(self) -> WinRate | None:
        """The win rate; None where too many comparisons failed."""
        failed = len(self.ballots) - len(self.decided)
        if not self.ballots or failed > MOST_FAILED * len(self.ballots):
            return None
        # In characters: the two models need not share a tokenizer, so their tokens are no common unit.
        differences = [float(len(question.second) - len(question.first)) for question in self.questions]
        return win_rate(self.preferences, [differences[number] for number in self.decided], self.clusters)


def question_of(prompt: Prompt, first: str, second: str) -> Question:
    """Which of two replies to a prompt is better?"""
    return Question(prompt.question, first, second, prompt.reference, prompt.pair)


def check_judge(judge: Judge, prompts: Sequence[Prompt], setting: str = "judge") -> None:
    """Find out before replies are drawn what would keep a judge from judging them.

    Raises:
        DataError: it needs right answers, and a prompt has none.
        ModelError: it is a model, and is not to be had, or a server that does not answer.
    """
    if isinstance(judge, Rule) and judge.needs_reference:
        check_references([question_of(prompt, "", "") for prompt in prompts], judge.name, setting)
    if isinstance(judge, Loaded):
        judge.find()


def check_answers(judge: Judge) -> None:
    """Raise TrainingError where a judge that another process is has stopped answering."""
    if isinstance(judge, Remote) and judge.lost:
        raise TrainingError(
            f"`judge={judge.name}`: has stopped answering; what was judged before is saved: start it again and give "
            "the same command"
        )


def compare_replies(
    judge: Judge,
    prompts: Sequence[Prompt],
    baseline: Sequence[str],
    candidate: Sequence[str],
    progress: Callable[[int], None] = lambda done: None,
) -> Judged:
    """Let `judge` compare two replies to each prompt, in both orders; equal replies are a tie, and not asked about."""
    questions = [
        question_of(prompt, first, second) for prompt, first, second in zip(prompts, baseline, candidate, strict=True)
    ]
    asked = [number for number, question in enumerate(questions) if question.first != question.second]
    found = [_SAME] * len(questions)
    for number, ballot in zip(asked, ballots(judge, [questions[number] for number in asked], progress), strict=True):
        found[number] = ballot
    return Judged(prompts, questions, found)


def figures(judged: Judged) -> dict[str, Any]:
    """Counts and rates as JSON has them; rates are null where too many comparisons failed."""
    result = judged.result()
    failed = count_failures(judged.ballots)
    preferences = judged.preferences
    count = len(judged.ballots)
    known = sum(preferences)
    found: dict[str, Any] = {
        "prompts": count,
        "distinct_prompts": len({prompt_key(prompt) for prompt in judged.prompts}),
        "judged": len(preferences),
        "judge_failures": sum(failed.values()),
        "failure_reasons": failed,
        "wins": sum(value > 0.5 for value in preferences),
        "losses": sum(value < 0.5 for value in preferences),
        "ties": sum(value == 0.5 for value in preferences),
        "identical_replies": sum(question.first == question.second for question in judged.questions),
        "win_rate": None,
        "interval": None,
        # Where the rate would lie if every failed judgement were a loss, or a win.
        "win_rate_bounds": [known / count, (known + sum(failed.values())) / count] if count else None,
        "win_rate_length_controlled": None,
        "interval_length_controlled": None,
        "length_coefficient": None,
    }
    if result is not None:
        found |= {
            "win_rate": result.rate.mean,
            "interval": list(result.rate[1:]),
            "win_rate_length_controlled": result.controlled.rate.mean,
            "interval_length_controlled": list(result.controlled.rate[1:]),
            "length_coefficient": result.controlled.length_coefficient,
        }
    return found


def by_category(judged: Judged) -> dict[str, dict[str, Any]]:
    """The figures of each category that rows name; empty where none does."""
    names = sorted({prompt.category for prompt in judged.prompts if prompt.category is not None})
    return {name: figures(_of_category(judged, name)) for name in names}


def _of_category(judged: Judged, name: str) -> Judged:
    kept = [number for number, prompt in enumerate(judged.prompts) if prompt.category == name]
    return Judged(
        [judged.prompts[number] for number in kept],
        [judged.questions[number] for number in kept],
        [judged.ballots[number] for number in kept],
    )


def order_figures(judged: Judged) -> dict[str, Any]:
    """How far the order of two replies decides: of a judge that heeds it not at all, half of the verdicts that are no
    ties are for the first, and both orders have the same winner."""
    # Equal replies are left out: no judge was asked, and their ties would make any judge look consistent.
    asked = [
        (ballot, prompt_key(prompt))
        for ballot, prompt, question in zip(judged.ballots, judged.prompts, judged.questions, strict=True)
        if ballot.failure is None and question.first != question.second
    ]
    firsts = [
        (float(verdict.winner == FIRST), key)
        for ballot, key in asked
        for verdict in ballot
        if verdict.winner in (FIRST, SECOND)
    ]
    share = mean_interval([value for value, _ in firsts], [key for _, key in firsts]) if firsts else None
    return {
        "verdicts": 2 * len(asked),
        "decided": len(firsts),
        "first_preferred": share_figures(share),
        "consistent": statistics.fmean(ballot.consistent for ballot, _ in asked) if asked else None,
    }


def share_figures(share: Interval | None) -> dict[str, float] | None:
    """A share with its interval, as JSON has it."""
    return None if share is None else {"share": share.mean, "low": share.low, "high": share.high}


def failures_text(found: dict[str, int]) -> str:
    """Failures by reason, in a clause."""
    return "; ".join(f"{count} {FAILURES[reason]}" for reason, count in found.items())
