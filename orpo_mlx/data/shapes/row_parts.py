"""What shapes of rows share: what they find, and the parts every row may have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from orpo_mlx.data.shapes.columns import Columns, with_system
from orpo_mlx.data.shapes.messages import as_turns, text_of, text_or_turns, unpacked
from orpo_mlx.errors import DataError
from orpo_mlx.types import Group, Pair, Text, TokenizedGroup, TokenizedPair

RowData = Pair | Group | TokenizedPair | TokenizedGroup
"""What a row can hold."""


class Options(NamedTuple):
    """How rows are taken where their columns leave that open."""

    pair_ratings: str | None = None
    """One of `ratings.PAIRINGS`."""
    labels: tuple[str, ...] = ()
    """A data set's words for a good and for a bad completion."""


class Found(NamedTuple):
    """What a shape found in a row."""

    pairs: list[RowData]
    note: str | None = None
    """Something to know about how the row was taken."""


class Completed(NamedTuple):
    """A prompt and its completions, all strings or all turns."""

    prompt: Text
    completions: tuple[Text, ...]


def completed(prompt: Text, completions: Sequence[Any], names: Sequence[str], row: Columns, location: str) -> Completed:
    """`prompt` with the row's system text, and its completions; where one is in turns, all are.

    Args:
        prompt: a string or turns.
        completions: the row's values.
        names: their names, for errors.
        row: the row they are of.
        location: where it stands.

    Raises:
        DataError: a completion that is none.
    """
    prompt = with_system(prompt, row, location)
    check_prompt(prompt, location)
    found = tuple(
        text_or_turns(unpacked(value, name, location), name, location, "assistant")
        for value, name in zip(completions, names, strict=True)
    )
    for name, text in zip(names, found, strict=True):
        # Trained on as an answer, it would teach the model to ask the question.
        if not isinstance(text, str) and text[0]["role"] in ("user", "system"):
            raise DataError(
                f"{location}: {name!r} begins with a turn of the {text[0]['role']}, expected the assistant's."
            )
    if all(isinstance(text, str) for text in (prompt, *found)):
        return Completed(prompt, found)
    return Completed(as_turns(prompt, "user"), tuple(as_turns(text, "assistant") for text in found))


def check_prompt(prompt: Text, location: str) -> None:
    """Refuse turns that end in the assistant's; raises DataError."""
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{location}: the prompt ends with a turn of the assistant, so the answer may be in it already; "
            "expected the user's turn last."
        )


def instruction_prompt(row: Columns, location: str) -> Text:
    """`instruction` with an optional `input` below it, and an optional `history` of earlier exchanges before it."""
    prompt = text_of(row["instruction"], "instruction", location)
    # On a line of its own, as the Alpaca template has it.
    if row.get("input"):
        prompt = f"{prompt}\n{text_of(row['input'], 'input', location)}"
    history = row.get("history") or []
    if not history:
        return prompt
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        raise DataError(f"{location}: 'history' must be a list of [question, answer] pairs.")
    turns = [
        {"role": role, "content": text_of(text, f"history[{number}]", location)}
        for number, exchange in enumerate(history)
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]
    return (*turns, {"role": "user", "content": prompt})


def ids_of(value: Any, name: str, location: str) -> tuple[int, ...]:
    # type() and not isinstance: true and false are whole numbers to the latter.
    # Below 2**31, since token stores hold ids in 32 bits.
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise DataError(f"{location}: {name!r} must be a list of token ids (whole numbers from 0).")
    return tuple(value)
