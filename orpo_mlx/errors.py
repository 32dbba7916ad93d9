"""Errors a user can mend. Each message is one sentence: the location, what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_REASON = 300
"""Characters of another package's message that are shown: some list hundreds of tensors."""


class UserError(Exception):
    """Something outside the code is wrong; command-line tools print it on one line and exit with status 2.

    A message mentions settings as Python has them, in backticks: `seed`, `memory=fast`, `shuffle=False`. The command
    line prints them as flags (`config.flags`).
    """


class ConfigError(UserError):
    """A flag or a config key is wrong."""


class DataError(UserError):
    """A data file or one of its rows is wrong; the message begins with `file:line`."""


class ModelError(UserError):
    """A model, tokenizer or adapter cannot be used."""


class TrainingError(UserError):
    """A run cannot go on; the message says what was saved and how to continue."""


class NonFiniteError(TrainingError):
    """A loss, a gradient or a parameter that is NaN or infinite; nothing of that step has been applied."""


class HalfAppliedError(TrainingError):
    """A step that ended while it was applied: what is in memory is neither before nor after it, and is not saved."""


def did_you_mean(word: object, known: Iterable[str], otherwise: str = ".") -> str:
    """How a message about an unknown word ends: with the known one nearest to it, or with `otherwise`."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else otherwise


def reason_of(error: BaseException, most: int | None = _MOST_REASON, *, first_line: bool = False) -> str:
    """What an exception says, on one line of at most `most` characters without a full stop, or else its type.

    `first_line` is for exceptions whose further lines are addresses and request numbers.
    """
    said = str(error).strip()
    if first_line:
        said = said.partition("\n")[0]
    return " ".join(said.split())[:most].rstrip(".,: ") or type(error).__name__


def kind_and_reason(error: BaseException) -> str:
    """`reason_of` after the exception's type, for those that say little without it."""
    kind = type(error).__name__
    reason = reason_of(error)
    return kind if reason == kind else f"{kind}: {reason}"
