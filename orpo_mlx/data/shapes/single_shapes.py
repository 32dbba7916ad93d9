"""The shapes of rows that hold one completion and say nothing of its worth: what supervised fine-tuning learns from."""

from __future__ import annotations

from orpo_mlx.data.shapes.columns import Columns, extras
from orpo_mlx.data.shapes.messages import as_turns, text_of, text_or_turns, texts
from orpo_mlx.data.shapes.ratings import COMPLETION_LISTS, weight_of
from orpo_mlx.data.shapes.row_parts import Completed, Found, Options, completed, instruction_prompt
from orpo_mlx.errors import DataError
from orpo_mlx.types import Group

# In the order of preference; mlx_lm.lora and TRL have the first of each.
# "input" comes last: beside an instruction it is what stands below that, and no prompt by itself.
_PROMPTS = ("prompt", "instruction", "question", "input")
_COMPLETIONS = ("completion", "response", "answer", "output")
_TURNS = ("messages", "conversations")
# Whoever has one of these has more to say than one completion.
_OTHERS = ("chosen", "rejected", "label", *COMPLETION_LISTS)


def holds_single_completion(row: Columns) -> bool:
    """Whether a row has one completion, beside its prompt or at the end of a conversation, and no word on its worth."""
    return not any(name in row for name in _OTHERS) and (
        any(name in row for name in _TURNS)
        or (_first(row, _PROMPTS) is not None and _first(row, _COMPLETIONS) is not None)
    )


def holds_text(row: Columns) -> bool:
    """Whether a row is one text and nothing else that is learned from."""
    return "text" in row and not any(name in row for name in (*_OTHERS, *_TURNS, *_PROMPTS, *_COMPLETIONS))


def whole_text(row: Columns, location: str, _: Options) -> Found:
    """A text without a prompt, all of which is learned: a group of one that is good."""
    text = text_of(row["text"], "text", location)
    weight = weight_of(row, location)
    return Found([Group("", (text,), (1.0,), True, ((0, 0),), location, weight=weight, whole_text=True)])


def single_completion(row: Columns, location: str, _: Options) -> Found:
    """A prompt and its completion, or a conversation whose last turn is learned: a group of one that is good."""
    parts = (
        _from_columns(row, location)
        if _first(row, _PROMPTS) and _first(row, _COMPLETIONS)
        else _from_turns(row, location)
    )
    # The pair that it is, its better side and its worse one being the same, counts as one of the step.
    return Found([Group(*parts, (1.0,), True, ((0, 0),), location, *extras(row, location), weight_of(row, location))])


def _from_columns(row: Columns, location: str) -> Completed:
    """`prompt` and `completion`, also under Alpaca's and other names."""
    name, answer = _first(row, _PROMPTS), _first(row, _COMPLETIONS)
    assert name is not None
    assert answer is not None
    prompt = (
        instruction_prompt(row, location) if name == "instruction" else text_or_turns(row[name], name, location, "user")
    )
    return completed(prompt, [row[answer]], [answer], row, location)


def _from_turns(row: Columns, location: str) -> Completed:
    """A conversation up to its first answer, and all from there; which turns of it are learned, `train_on` says."""
    name = _first(row, _TURNS)
    assert name is not None
    turns = texts(row[name], name, location)
    if turns[-1]["role"] != "assistant":
        raise DataError(
            f"{location}: {name!r} ends with a turn of the {turns[-1]['role']}, expected the assistant's, which is "
            "what is learned."
        )
    first = next(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    if first == 0:
        raise DataError(f"{location}: {name!r} begins with an answer, expected what it answers before it.")
    return completed(as_turns(turns[:first], "user"), [list(turns[first:])], [name], row, location)


def _first(row: Columns, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)
