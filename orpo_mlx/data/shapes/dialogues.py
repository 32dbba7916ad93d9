"""Where a row has no prompt of its own: the beginning that both completions share, as whole turns or whole words."""

from __future__ import annotations

import itertools
import re
import unicodedata
from typing import Any, NamedTuple

from orpo_mlx.errors import DataError
from orpo_mlx.types import Message, Text

# At the beginning of a paragraph only: answers may well say "Human:" within one.
_SPEAKER = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):[ \t]*")
_ROLES = {"Human": "user", "Assistant": "assistant"}

# Joiners, skin tones and tags, which make one character with what stands before them or after.
_JOINING = re.compile("[\u200c\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
# Stops and closing brackets of scripts that put no space between words, and a space of no width.
_WIDE_PUNCTUATION = "\u3002\u3001\uff01\uff1f\uff1a\uff1b\uff0c\u300d\u300f\uff09\u300b\u3011\u200b"


class Sides(NamedTuple):
    """What a row compares."""

    prompt: Text
    chosen: Text
    rejected: Text


def is_dialogue(value: Any) -> bool:
    """Whether a value is a string of "\\n\\nHuman: ...\\n\\nAssistant: ...", as in hh-rlhf."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def dialogue_turns(text: str) -> tuple[Message, ...]:
    """The turns of such a string."""
    pieces = _SPEAKER.split(text.strip())[1:]
    return tuple(
        {"role": _ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    )


def dialogue_prompt(text: str) -> tuple[Message, ...]:
    """The turns of such a string without the empty one of the assistant that it may end in."""
    turns = dialogue_turns(text)
    return turns[:-1] if turns[-1]["content"] == "" else turns


def split_turns(chosen: tuple[Message, ...], rejected: tuple[Message, ...], location: str) -> Sides:
    """Two conversations as the whole turns they share, up to an answer, and what each adds.

    Raises:
        DataError: they share none, or differ in a turn that is not the assistant's.
    """
    same = itertools.takewhile(lambda turns: turns[0] == turns[1], zip(chosen, rejected, strict=False))
    shared = sum(1 for _ in same)
    if chosen == rejected:
        # They differ nowhere: their last answer is then the side, so that they count as equal sides.
        shared = len(chosen) - 1
    if shared == 0:
        raise DataError(f"{location}: there is no prompt, and chosen and rejected share no first turn.")
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) > shared and turns[shared]["role"] != "assistant":
            role = turns[shared]["role"]
            raise DataError(
                f"{location}: {side}[{shared}], the first turn that differs, is of role {role!r}, "
                "expected the assistant's."
            )
    return Sides(chosen[:shared], chosen[shared:], rejected[shared:])


def split_words(chosen: str, rejected: str, location: str) -> Sides:
    """Two strings as the whole words they begin with, and what each adds.

    Raises:
        DataError: they share no word.
    """
    shared = _shared_words(chosen, rejected)
    if not shared.strip():
        raise DataError(f"{location}: there is no prompt, and chosen and rejected do not begin with the same words.")
    return Sides(shared, chosen[len(shared) :], rejected[len(shared) :])


def _shared_words(first: str, second: str) -> str:
    """The longest common beginning that ends where a word ends in both, without the white space after it."""
    length = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))
    # Back to where the word begins: a prompt that ended within one would have the model finish it.
    while length and not (_ends_word(first, length) and _ends_word(second, length)):
        length -= 1
    return first[:length].rstrip()


def _ends_word(text: str, end: int) -> bool:
    """Whether a word surely ends before `end`: at white space, or after punctuation of scripts that write none.

    Anything else is within a word to somebody: 3.14, can't, my_value, an address, letters joined by a mark.
    """
    if end == len(text):
        return True
    # A mark after a space hangs on it; so does what a joiner joins.
    if unicodedata.category(text[end]).startswith("M") or _JOINING.match(text[end]) or _JOINING.match(text[end - 1]):
        return False
    if text[end].isspace() or text[end - 1].isspace():
        return True
    return text[end - 1] in _WIDE_PUNCTUATION and text[end] not in _WIDE_PUNCTUATION
