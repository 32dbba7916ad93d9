"""Judges that score each reply by itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from orpo_mlx.judging.judges.verdicts import FIRST, SECOND, TIE, Question, Verdict
from orpo_mlx.types import Pair, Text

REWARD = "reward:"
"""What the name of a reward model as a judge begins with."""
IMPLICIT = "implicit:"
"""The same of adapters whose reward is meant."""


class Asked(NamedTuple):
    """A reply and what a scorer may know of it."""

    reply: str
    prompt: str
    """The last turn before it."""
    reference: str | None = None
    """A right answer, where one is known."""
    row: Pair | None = None
    """The row that the prompt is of; its sides mean nothing."""

    def pair_with(self, other: Asked) -> Pair:
        """The conversation with this reply as the one side and another reply to the same prompt as the other."""
        # Where nothing else is known, the prompt is a text by itself.
        row = self.row or Pair(self.prompt, "", "", "a reply to be judged")
        return row._replace(chosen=_side(row.prompt, self.reply), rejected=_side(row.prompt, other.reply), margin=None)


class Score(NamedTuple):
    """What a scorer makes of a reply: a number, the higher the better, or else a failure."""

    value: float | None
    failure: str | None = None
    """A key of `FAILURES`."""


def number(value: float) -> Score:
    """A score that a model gave."""
    return Score(value) if math.isfinite(value) else Score(None, "no_number")


class Scorer(ABC):
    """A judge that scores each reply by itself; the higher score wins, equal ones are a tie."""

    name: str
    fair = True

    @property
    def identity(self) -> str:
        """Equal for scorers that give the same scores, as far as can be told without running them."""
        return self.name

    @abstractmethod
    def scores(self, asked: Sequence[Asked], progress: Callable[[int], None]) -> list[Score]:
        """A score for each reply; `progress` is called with the number scored so far."""

    def __call__(self, questions: Sequence[Question], progress: Callable[[int], None]) -> list[Verdict]:
        """See `Judge`."""
        asked = [
            Asked(reply, question.prompt, question.reference, question.row)
            for question in questions
            for reply in (question.first, question.second)
        ]
        found = self.scores(asked, lambda done: progress(done // 2))
        return [_verdict(*both) for both in zip(found[::2], found[1::2], strict=True)]


def _verdict(first: Score, second: Score) -> Verdict:
    if first.value is None or second.value is None:
        return Verdict(None, first.failure or second.failure)
    return Verdict(TIE if first.value == second.value else FIRST if first.value > second.value else SECOND)


def _side(prompt: Text, reply: str) -> Text:
    return reply if isinstance(prompt, str) else ({"role": "assistant", "content": reply},)
