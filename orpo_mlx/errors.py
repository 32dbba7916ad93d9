"""Errors a user can mend. Each message is one sentence: the location, what was found, what was expected, what to do."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from orpo_mlx.text import printable


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
