"""Which tokens of a completion of several turns are learned, and how that is written beside its token ids.

A token that is read and not learned, as of a turn of the user's, stands in a completion as ~id, a negative number: so a
completion, cut or stored or moved, keeps with each token whether it is learned. `read_ids` gives the ids themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from orpo_mlx.errors import DataError
from orpo_mlx.types import Message

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TRAINED_TURNS = ("assistant", "last", "all")
"""What of a completion is learned: the assistant's turns, its last turn, or all tokens."""

_ASSISTANTS = ("assistant", "model")
# Texts to put in an answer's place; no two begin or end alike.
_MARKS = ("Zq1", "Yx2", "Wv3")

Ids = Sequence[int]
Render = Callable[[Sequence[Message], bool], str]
"""`render(turns, add_generation_prompt)`."""


class Stretch(NamedTuple):
    """A part of a text, in characters."""

    start: int
    end: int


def read_ids(ids: Ids) -> list[int]:
    """The token ids of a completion, learned or not."""
    return [token if token >= 0 else ~token for token in ids]


def learned_places(ids: Ids) -> npt.NDArray[np.int64]:
    """Where in a completion the learned tokens stand."""
    # Here, for the settings take a name from this module, and --help waits for no library.
    import numpy as np

    return np.flatnonzero(np.array(ids, np.int64) >= 0)


def learned_ids(ids: Ids) -> list[int]:
    """The learned tokens of a completion."""
    return [token for token in ids if token >= 0]


def marked(ids: Ids, starts: Sequence[int], stretches: Sequence[Stretch]) -> tuple[int, ...]:
    """A completion whose tokens are learned where they begin within one of the stretches.

    Args:
        ids: its token ids.
        starts: where in the text each of them begins.
        stretches: of the text.
    """
    learned = (any(stretch.start <= start < stretch.end for stretch in stretches) for start in starts)
    return tuple(token if keep else ~token for token, keep in zip(ids, learned, strict=True))


def learned_stretches(
    render: Render,
    before: Sequence[Message],
    turns: Sequence[Message],
    text: str,
    begin: int,
    which: str,
    closings: Sequence[str],
) -> list[Stretch] | None:
    """What the assistant says in a text, each time from behind its header to its EOS; None where all is learned.

    A template may write a turn in another way once others follow it, so a turn is found in the whole text: by what
    changes there when the turn is another one.

    Args:
        render: the chat template.
        before: the prompt's turns.
        turns: the completion's.
        text: of all of them.
        begin: where the completion begins in it.
        which: one of `TRAINED_TURNS`.
        closings: what may end a turn: the texts of the tokenizer's EOS, or what the template writes up to it.

    Raises:
        DataError: the template refuses parts of the conversation, so that a turn cannot be found.
    """
    if which == "all" or len(turns) == 1:
        return None
    spoken = [number for number, turn in enumerate(turns) if turn["role"] in _ASSISTANTS]
    found = []
    for number in spoken[-1:] if which == "last" else spoken:
        so_far = (*before, *turns[:number])
        header = render(so_far, True)
        try:
            other = render((*so_far, _another(turns[number]), *turns[number + 1 :]), False)
        except DataError:
            # Some templates take a tool's result behind a call alone.
            until = render((*so_far, turns[number]), False).rstrip()
            if not (text.startswith(header) and text.startswith(until)):
                raise
            stretch = Stretch(len(header), len(until))
        else:
            stretch = _difference(text, other)
        # What generation would start from, where the text goes on from it: a template may begin each answer alike.
        start = len(header) if text.startswith(header) and len(header) <= stretch.start else stretch.start
        if number == 0:
            start = begin
        end = len(text) if number == len(turns) - 1 else _end_of_turn(text, stretch.end, closings)
        found.append(Stretch(start, end))
    return found


def _another(turn: Message) -> Message:
    """A turn of the same role that says something that begins and ends otherwise, and calls no tool."""
    said = turn["content"].strip()
    marks = (mark for mark in _MARKS if mark[0] != said[:1] and mark[-1] != said[-1:])
    return {"role": turn["role"], "content": next(marks)}


def _difference(text: str, other: str) -> Stretch:
    """The part of `text` that lies between what both begin and what both end with."""
    most = min(len(text), len(other))
    start = next((place for place in range(most) if text[place] != other[place]), most)
    # No further back than `start`: in a text that repeats itself the two ends would overlap.
    same = next((back for back in range(most - start) if text[-1 - back] != other[-1 - back]), most - start)
    return Stretch(start, len(text) - same)


def _end_of_turn(text: str, end: int, closings: Sequence[str]) -> int:
    """`end`, or where the closing that follows it ends: generation stops there."""
    rest = text[end:]
    blank = len(rest) - len(rest.lstrip())
    found = [closing for closing in closings if rest.startswith(closing, blank)]
    return end + blank + max(map(len, found)) if found else end
