"""Prompts of a data set, whether or not its rows have answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from orpo_mlx.data.pairs import raise_no_rows, renamed
from orpo_mlx.data.shapes.columns import COMPLETION_IDS, PAIR_ID_COLUMNS, readable
from orpo_mlx.data.shapes.formats import has_sides, read_row
from orpo_mlx.data.shapes.messages import holds_messages, is_empty, kind, message, speaker_of, texts
from orpo_mlx.data.shapes.ratings import label_of
from orpo_mlx.data.sources import Source
from orpo_mlx.errors import DataError
from orpo_mlx.types import Pair, Text

Item = TypeVar("Item")

# Sides that no row is judged by: with them, whatever shape a row has, its prompt is read as training would read it.
_NO_SIDES = {"chosen": "-", "rejected": "-"}
_CATEGORIES = ("subset", "category")
_PROMPTS = ("prompt", "question", "instruction", "input", "messages", "conversations")
_ANSWERS = ("completion", "answer", "output", "response")


class Prompt(NamedTuple):
    """What a model is asked, and what is known of the right answer."""

    pair: Pair
    """Its prompt, tools and template arguments; its sides mean nothing."""
    reference: str | None
    """A right answer: the chosen side, or the answer the row has, unless a label calls it bad."""
    category: str | None
    """The row's `subset` or `category`."""

    @property
    def location(self) -> str:
        """Where it was read, `file:line`."""
        return self.pair.location

    @property
    def question(self) -> str:
        """The last turn as text."""
        return plain_text(self.pair.prompt)


def read_prompts(source: Source, columns: Mapping[str, str] | None = None) -> Iterator[Prompt]:
    """The prompt of every row, in order.

    Rows are pairs of any shape that training reads, or the same without their sides: a prompt, a question, an
    instruction, or messages whose last turn, where it is the assistant's, is taken as the right answer.

    Raises:
        DataError: the file cannot be read, has no row, or a row has no prompt in text.
    """
    count = 0
    for row in source.rows():
        count += 1
        if isinstance(row.value, DataError):
            raise row.value
        yield read_prompt(renamed(row, columns or {}), row.location)
    if not count:
        raise_no_rows(source.name)


def read_prompt(row: Any, location: str) -> Prompt:
    """The prompt in a row.

    Raises:
        DataError: it has none in text.
    """
    if not isinstance(row, dict):
        raise DataError(f"{location}: found a JSON {kind(row)}, expected an object with a prompt.")
    if any(name in row for name in (*PAIR_ID_COLUMNS, COMPLETION_IDS)):
        raise DataError(f"{location}: the row is token ids, which nobody can judge; give the prompt as text.")
    if not has_sides(row) and not any(name in row for name in _PROMPTS):
        found = ", ".join(sorted(map(str, row))[:8]) or "no keys"
        raise DataError(f"{location}: the row has no prompt; found {found}, expected one of {', '.join(_PROMPTS)}.")
    # Tables hold messages as JSON in a text.
    row = {name: readable(value, name, location) for name, value in row.items()}
    answers = (_answer_in(row.get(name), name, location) for name in _ANSWERS)
    answer = next((found for found in answers if found is not None), None)
    if not has_sides(row):
        row, last = _without_last_answer(row, location)
        answer = answer if last is None else last
    # The row's own columns last: where it has sides, the prompt may be what they share.
    pair = read_row({**_NO_SIDES, **row}, location).pairs[0]
    assert isinstance(pair, Pair)
    if is_empty(pair.prompt):
        raise DataError(f"{location}: the prompt is empty.")
    if "chosen" in row:
        answer = plain_text(pair.chosen)
    elif "label" in row and not _is_called_good(row["label"], location):
        answer = None
    return Prompt(pair, answer, category_of(row))


def category_of(row: Mapping[str, Any]) -> str | None:
    """A row's `subset` or `category`."""
    return next((str(row[name]) for name in _CATEGORIES if row.get(name) is not None), None)


def _is_called_good(label: Any, location: str) -> bool:
    """Whether a label calls a completion good; in words of the data set's own nobody here knows."""
    try:
        return label_of(label, location, ())
    except DataError:
        return False


def _answer_in(value: Any, name: str, location: str) -> str | None:
    """The text of an answer: a string, or the last turn of messages; None of anything else."""
    if isinstance(value, str):
        return value
    return plain_text(texts(value, name, location)) or None if holds_messages(value) else None


def _without_last_answer(row: dict[str, Any], location: str) -> tuple[dict[str, Any], str | None]:
    """A row without the assistant's turn at the end of its messages, and that turn's text."""
    for name in ("messages", "conversations", "prompt"):
        turns = row.get(name)
        if isinstance(turns, list) and len(turns) > 1 and speaker_of(turns[-1]) == "assistant":
            last = message(turns[-1], f"{name}[{len(turns) - 1}]", location)
            return {**row, name: turns[:-1]}, last["content"] or None
    return row, None


def plain_text(text: Text) -> str:
    """A prompt's or completion's last turn as text."""
    return text if isinstance(text, str) else str(text[-1]["content"])


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, each once, where it stands first."""
    seen: dict[tuple[Any, ...], Prompt] = {}
    for prompt in prompts:
        seen.setdefault(prompt_key(prompt), prompt)
    return list(seen.values())


def prompt_key(prompt: Prompt) -> tuple[Any, ...]:
    """Equal for prompts that a model is asked in the same words."""
    # As text, since turns are tables, which cannot be hashed.
    return (repr(prompt.pair.prompt), repr(prompt.pair.tools), repr(prompt.pair.template_kwargs))


def spread(items: list[Item], most: int | None) -> list[Item]:
    """At most `most` of some prompts, or of what goes with them (None: all), spread evenly."""
    return items if most is None else [items[index] for index in evenly_spread(len(items), most)]


def evenly_spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`: the middles of equal parts, so that neither end is favoured."""
    count = min(count, total)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]
