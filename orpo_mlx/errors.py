"""Errors a user can mend. Each message is one sentence: the place, what was found, what was expected, what to do."""

from __future__ import annotations

import os
import re

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST_TOKEN = 8
_REDACTED = "[token]"


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


def printable(text: str) -> str:
    """`text` on one line, with control characters spelled out, so that data cannot move a terminal's cursor, and
    without access tokens."""
    shown = (character if character.isprintable() else ascii(character)[1:-1] for character in redacted(text))
    return "".join(shown)


def printable_lines(text: str) -> str:
    """`printable` for each line of `text`."""
    return "\n".join(map(printable, text.split("\n")))


def redacted(text: str) -> str:
    """`text` without what looks like a token of the Hub, and without the tokens this process was given."""
    for name in _TOKEN_VARIABLES:
        token = os.environ.get(name, "")
        if len(token) >= _SHORTEST_TOKEN:
            text = text.replace(token, _REDACTED)
    return _TOKEN.sub(_REDACTED, text)
