"""What shapes of rows share: what they find, and the parts every row may have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.data.messages import as_turns, text_of, text_or_turns
from orpo_mlx.errors import DataError
from orpo_mlx.types import Group, Pair, Text, TokenizedGroup, TokenizedPair

Columns = Mapping[str, Any]
"""A row: values by column."""

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


class Extras(NamedTuple):
    """What a row gives its chat template besides turns."""

    tools: tuple[Mapping[str, Any], ...]
    template_kwargs: Mapping[str, Any]


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
    system = row.get("system") or row.get("system_prompt")
    if system:
        prompt = ({"role": "system", "content": text_of(system, "system", location)}, *as_turns(prompt, "user"))
    found = tuple(
        text_or_turns(value, name, location, "assistant") for value, name in zip(completions, names, strict=True)
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


_NOT_A_ROWS = (
    "chat_template", "conversation", "messages", "tokenize", "return_dict", "return_tensors", "padding", "truncation",
    "return_assistant_tokens_mask", "max_length", "tokenizer_kwargs", "add_generation_prompt", "continue_final_message",
    "tools",
)  # fmt: skip
"""Arguments of transformers' `apply_chat_template` that are not for the template."""


def extras(row: Columns, location: str) -> Extras:
    """The row's `tools` and `chat_template_kwargs`."""
    tools = _from_json(row.get("tools"), "tools", location) or []
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{location}: 'tools' must be a list of tool descriptions (objects).")
    arguments = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs", location) or {}
    if not isinstance(arguments, dict):
        raise DataError(f"{location}: 'chat_template_kwargs' must be an object.")
    for name in arguments:
        # What a template is told is the row's; which template, and what is asked of it, is not.
        if name in _NOT_A_ROWS:
            raise DataError(
                f"{location}: 'chat_template_kwargs' holds {name!r}, which rows cannot set; leave it out (a chat "
                "template is the model's: change it in its tokenizer_config.json)."
            )
    return Extras(tuple(_without_nulls(tool) for tool in tools), _without_nulls(arguments))


def _from_json(value: Any, name: str, location: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{location}: {name!r} is text but not JSON.") from None


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object the keys of all of them, null where there was none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def ids_of(value: Any, name: str, location: str) -> tuple[int, ...]:
    # type() and not isinstance: true and false are whole numbers to the latter.
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise DataError(f"{location}: {name!r} must be a list of token ids (whole numbers from 0).")
    return tuple(value)
