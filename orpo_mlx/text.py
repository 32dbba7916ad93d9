"""Text made safe to print and to show: no control characters, no access tokens, no folders of a user's."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")

_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

# Anything shorter would be cut out of ordinary words.
_SHORTEST_TOKEN = 8

_REDACTED = "[token]"

_MOST_QUOTED = 100

_SPELLED = "orpo_mlx.spelled"


def printable(text: str) -> str:
    """`text` on one line, with control characters spelled out, so that data cannot move a terminal's cursor, and
    without access tokens."""
    text = redacted(text)
    # Nearly all texts are; a page's pictures are a million characters.
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def clipped(text: str, most: int) -> str:
    """`text` in at most that many characters: what a message quotes may be of any length, what it says stands at its
    ends."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 5]} ... {text[len(text) - tail :]}"


def quoted(value: object) -> str:
    """A value as a message quotes it: as Python writes it, but not at any length."""
    try:
        return clipped(repr(value), _MOST_QUOTED)
    except ValueError:  # Python refuses to write numbers of more than 4300 digits, which YAML reads in base 16.
        return "a number of thousands of digits"
    except RecursionError:
        return "something that is nested too deeply"


def printable_lines(text: str) -> str:
    """`printable` for each line of `text`."""
    return "\n".join(map(printable, text.split("\n")))


def spell_unprintable() -> None:
    """From now on, what the encoding of standard output lacks (ASCII in many containers and pipes) is spelled out.

    As JSON spells it, \\u03b2, so that what is printed as JSON stays JSON.
    """
    codecs.register_error(_SPELLED, _spell)
    for stream in (sys.stdout, sys.stderr):
        # In the C locale standard output is no longer strict, and as unable.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=_SPELLED)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """An error handler of `codecs`: the characters that cannot be encoded as ASCII, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def redacted(text: str) -> str:
    """`text` without what looks like a token of the Hub, and without the tokens this process was given."""
    for name in _TOKEN_VARIABLES:
        token = os.environ.get(name, "")
        if len(token) >= _SHORTEST_TOKEN:
            text = text.replace(token, _REDACTED)
    return _TOKEN.sub(_REDACTED, text)


def shareable(value: Any) -> Any:
    """A JSON value whose local paths are cut down to their last part."""
    # What they lie below, a user's name for one, is nobody's business.
    if isinstance(value, Mapping):
        return {key: shareable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shareable(each) for each in value]
    return ", ".join(map(_last_part, value.split(", "))) if isinstance(value, str) else value


def _last_part(word: str) -> str:
    is_path = word.startswith(("/", "~", "./", "../")) or PurePath(word).is_absolute() or "\\" in word
    return re.split(r"[/\\]", word.rstrip("/\\"))[-1] if is_path else word
