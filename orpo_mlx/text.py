"""Text made safe to print: no control characters, no access tokens."""

from __future__ import annotations

import os
import re

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")

_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

_SHORTEST_TOKEN = 8

_REDACTED = "[token]"


def printable(text: str) -> str:
    """`text` on one line, with control characters spelled out, so that data cannot move a terminal's cursor, and
    without access tokens."""
    shown = (character if character.isprintable() else ascii(character)[1:-1] for character in redacted(text))
    return "".join(shown)


def clipped(text: str, most: int) -> str:
    """`text` in at most that many characters: what a message quotes may be of any length, what it says stands at its
    ends."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 5]} ... {text[len(text) - tail :]}"


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
