"""Errors a user can mend. Each message is one sentence: the location, what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Callable, Iterable

from orpo_mlx.text import printable

_MOST_REASON = 300
"""Characters of another package's message that are shown: some list hundreds of tensors."""


class UserError(Exception):
    """Something outside the code is wrong; command-line tools print it on one line and exit with status 2."""


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
    kind, words = type(error).__name__, reason_of(error)
    return kind if words == kind else f"{kind}: {words}"


def exit_status(prog: str, command: Callable[[], object]) -> int:
    """Run a command: 0, 2 with one sentence on stderr for what a user can mend, 130 or 143 where it was interrupted."""
    try:
        command()
    except UserError as error:
        message = printable(str(error)).rstrip(".")
        print(f"{prog}: error: {message}{'' if message.endswith('?') else '.'}", file=sys.stderr)
        return 2
    except OSError as error:  # A full disk, or a folder that cannot be written, wherever a command meets it.
        location = f"{error.filename}: " if error.filename else ""
        print(
            f"{prog}: error: {location}{error.strerror or error}; free space or choose another folder.", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"{prog}: interrupted: {str(interrupt) or 'nothing was saved'}.", file=sys.stderr)
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    return 0
