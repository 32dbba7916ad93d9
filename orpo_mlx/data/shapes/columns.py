"""The columns of a row: values as they were before somebody put them into a table, and what goes with every shape."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from orpo_mlx.data.shapes.messages import as_turns, text_of, texts, unpacked
from orpo_mlx.data.shapes.ratings import COMPLETION_LISTS, LIST_SCORES
from orpo_mlx.data.shapes.tool_calls import from_json, plain_json, tool_description
from orpo_mlx.errors import DataError
from orpo_mlx.types import Text

COLUMNS = (
    *("prompt", "chosen", "rejected", "system", "question", "instruction", "input", "history", "conversations"),
    *("messages", "tools", "chat_template_kwargs", "completions", "scores", "score_chosen", "score_rejected"),
    *("weight", "completion", "label", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids"),
)
"""Names that a data set's own columns can be given."""

# Columns whose text may be messages as JSON.
_TEXTS = (
    *("prompt", "chosen", "rejected", "system", "system_prompt", "question", "instruction", "input"),
    *("preferred_output", "non_preferred_output", "rejected_response", "rejected_messages"),
    *("conversations", "messages", "completion", "response", "answer", "generation", "output"),
)
_SYSTEM = ("system", "system_prompt")
# OpenAI calls a system turn that its newer models see the developer's.
_SYSTEM_ROLES = ("system", "developer")

PROMPTS = ("prompt", "question", "instruction", "input", "conversations", "messages")
"""Columns that can hold a prompt."""

ID_COLUMNS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
)
"""Columns of token ids."""
PAIR_ID_COLUMNS = tuple(itertools.chain(*ID_COLUMNS))
"""Columns of a pair whose values are token ids."""
COMPLETION_IDS = "completion_ids"
"""The column of a row that is one completion, or several, as token ids."""

# Columns that hold lists, whose text can only be JSON.
_LISTS = ("history", COMPLETION_IDS, *COMPLETION_LISTS, *LIST_SCORES, *PAIR_ID_COLUMNS)
_RECOGNISED = {*COLUMNS, *_TEXTS, *_LISTS, "functions"}
# Arguments of transformers' `apply_chat_template` that are not for the template.
_NOT_A_ROWS = {
    *(
        "chat_template",
        "conversation",
        "messages",
        "tokenize",
        "return_dict",
        "return_tensors",
        "padding",
        "truncation",
    ),
    *("return_assistant_tokens_mask", "max_length", "tokenizer_kwargs", "add_generation_prompt", "tools"),
    *("continue_final_message",),
}

Columns = Mapping[str, Any]
"""A row: values by column."""


class WatchedColumns(Mapping[str, Any]):
    """A row that remembers which of its columns were read."""

    def __init__(self, row: Columns) -> None:
        self._row = row
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._row[name]
        self.used.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


class Extras(NamedTuple):
    """What a row gives its chat template besides turns."""

    tools: tuple[Mapping[str, Any], ...]
    template_kwargs: Mapping[str, Any]


def is_given(value: Any, name: str) -> bool:
    """Whether a row has something in a column: Arrow has null where there was none, and CSV an empty text."""
    # A label of null is a label that was lost, and no reason to take the row for one of another kind.
    # An empty text in a column of texts is given: it is counted as an empty side, not refused as a missing one.
    return name == "label" or (value is not None and (value != "" or name in _TEXTS or name == "text"))


def readable(value: Any, name: str, location: str) -> Any:
    """A column's value, where it stands as JSON in a text as what that says."""
    if not isinstance(value, str):
        return value
    if name in _TEXTS:
        return unpacked(value, name, location)
    return from_json(value, name, location) if name in _LISTS and value.lstrip().startswith("[") else value


def unused(row: Columns, used: set[str]) -> str | None:
    """A note of columns with names that rows are read by, but which this row was not."""
    names = sorted(name for name in row.keys() & _RECOGNISED - used if row[name] not in (None, "", [], {}))
    # Columns that repeat another, such as the chosen conversation once more, lose nothing.
    names = [name for name in names if all(row[name] != row[other] for other in used)]
    return f"without their {' and '.join(names)}, which the rest of the row has no use for" if names else None


def with_system(prompt: Text, row: Columns, location: str) -> Text:
    """A prompt that begins with the row's system text, once; the same one where it does already, or there is none.

    Raises:
        DataError: the row has several system texts.
    """
    given = {name: _system_text(row[name], name, location) for name in _SYSTEM if row.get(name)}
    if not any(text.strip() for text in given.values()):
        return prompt
    turns = as_turns(prompt, "user")
    own = [turn["content"] for turn in turns[:1] if turn["role"] in _SYSTEM_ROLES]
    if len({text.strip() for text in (*given.values(), *own)}) > 1:
        raise DataError(
            f"{location}: the {' and '.join(given)} column{' and the first turn' if own else 's'} are different system "
            "texts, expected one; remove one, or say which column it is with `columns=system=NAME`."
        )
    return prompt if own else ({"role": "system", "content": next(iter(given.values()))}, *turns)


def _system_text(value: Any, name: str, location: str) -> str:
    """The text of a system column, which may hold it as a message."""
    if isinstance(value, (dict, list)):
        turns = texts(value, name, location)
        if len(turns) > 1 or turns[0]["role"] not in _SYSTEM_ROLES:
            raise DataError(f"{location}: {name!r} holds turns, expected the text of one system turn.")
        return str(turns[0]["content"])
    return text_of(value, name, location)


def _from_functions(row: Columns, location: str) -> list[Any]:
    """Tools out of `functions`, OpenAI's older name for them, which are not in an envelope."""
    functions = from_json(row.get("functions"), "functions", location) or []
    if not (isinstance(functions, list) and all(isinstance(function, dict) for function in functions)):
        raise DataError(f"{location}: 'functions' must be a list of descriptions of functions (objects).")
    return [{"type": "function", "function": function} for function in functions]


def extras(row: Columns, location: str) -> Extras:
    """The row's `tools` and `chat_template_kwargs`."""
    tools = from_json(row.get("tools"), "tools", location) or _from_functions(row, location)
    if isinstance(tools, list):
        tools = [from_json(tool, "tools", location) for tool in tools]
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{location}: 'tools' must be a list of tool descriptions (objects).")
    arguments = from_json(row.get("chat_template_kwargs"), "chat_template_kwargs", location) or {}
    if not isinstance(arguments, dict):
        raise DataError(f"{location}: 'chat_template_kwargs' must be an object.")
    for name in arguments:
        # What a template is told is the row's; which template, and what is asked of it, is not.
        if name in _NOT_A_ROWS:
            raise DataError(
                f"{location}: 'chat_template_kwargs' holds {name!r}, which rows cannot set; leave it out (a chat "
                "template is the model's: change it in its tokenizer_config.json)."
            )
    plain_json([tools, arguments], "tools", location)
    return Extras(tuple(map(tool_description, tools)), arguments)
