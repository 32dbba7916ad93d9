"""The shapes of rows that data sets have, recognised by their columns: each turns a row into pairs.

Adding a shape is a function and an entry of `SHAPES` here, and a row in `tests/data/test_formats.py`. The first shape
that fits reads the row.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from orpo_mlx.data.dialogues import Sides, dialogue_prompt, dialogue_turns, is_dialogue, split_turns, split_words
from orpo_mlx.data.messages import as_turns, kind, text_of, text_or_turns, texts
from orpo_mlx.data.ratings import COMPLETION_LISTS, margin_of, ranked_pairs, weight_of
from orpo_mlx.errors import DataError
from orpo_mlx.types import Pair, Text, TokenizedPair

COLUMNS = (
    *("prompt", "chosen", "rejected", "system", "question", "instruction", "input", "history", "conversations"),
    *("messages", "tools", "chat_template_kwargs", "completions", "scores", "score_chosen", "score_rejected"),
    *("weight", "prompt_ids", "chosen_ids", "rejected_ids"),
)
"""Names that a data set's own columns can be given."""

PROMPT_ELSEWHERE = "whose prompt column is not a turn of its conversation, which was used"

_ID_COLUMNS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
)
_SIDES = ("chosen", "rejected")
# Where a row of rated completions has its prompt.
_RATED_PROMPTS = ("prompt", "instruction", "question", "messages")

_EXPECTED = "prompt, chosen and rejected (or prompt_ids, chosen_ids and rejected_ids)"

Columns = Mapping[str, Any]
"""A row: values by column."""


class Found(NamedTuple):
    """What a shape found in a row."""

    pairs: list[Pair | TokenizedPair]
    note: str | None = None
    """Something to know about how the row was taken."""


class Extras(NamedTuple):
    """What a row gives its chat template besides turns."""

    tools: tuple[Mapping[str, Any], ...]
    template_kwargs: Mapping[str, Any]


class ReadRow(NamedTuple):
    """What a row was taken for."""

    shape: str
    pairs: list[Pair | TokenizedPair]
    note: str | None


class Shape(NamedTuple):
    """A kind of row."""

    name: str
    fits: Callable[[Columns], bool]
    read: Callable[[Columns, str, str | None], Found]
    """`read(row, location, pair_ratings)`; raises `DataError` where the row does not hold what its columns say."""


def read_row(row: Any, location: str, *, pair_ratings: str | None = None) -> ReadRow:
    """The pairs in a row, whatever its shape; `pair_ratings` is one of `ratings.PAIRINGS`.

    Raises:
        DataError: the row has no known shape, or does not hold what its shape says.
    """
    if not isinstance(row, dict):
        raise DataError(f"{location}: found a JSON {kind(row)}, expected an object with {_EXPECTED}.")
    for shape in SHAPES:
        if shape.fits(row):
            return ReadRow(shape.name, *shape.read(row, location, pair_ratings))
    missing = [name for name in _SIDES if name not in row]
    found = ", ".join(sorted(map(str, row))[:8]) or "no keys"
    raise DataError(
        f"{location}: the row has no {' and no '.join(map(repr, missing))}; found {found}, expected {_EXPECTED}; "
        f"`columns={missing[0]}=NAME` says which column it is."
    )


# What each shape's columns hold


def token_ids(row: Columns, location: str, _: str | None) -> Found:
    """Token ids of prompt and sides, taken as they are."""
    columns = next(names for names in _ID_COLUMNS if any(name in row for name in names))
    missing = [name for name in columns if name not in row]
    if missing:
        raise DataError(
            f"{location}: the row has no {' and no '.join(map(repr, missing))}; expected {', '.join(columns)}."
        )
    prompt, chosen, rejected = (_ids(row[name], name, location) for name in columns)
    scored = (margin_of(row, location), weight_of(row, location))
    return Found([TokenizedPair(prompt, chosen, rejected, location, *scored)])


def rated_completions(row: Columns, location: str, pair_ratings: str | None) -> Found:
    """A list of rated completions of one prompt."""
    if pair_ratings is None:
        raise DataError(
            f"{location}: the row holds a list of rated completions, expected chosen and rejected; "
            "in train and inspect, `pair_ratings=best_worst` or `pair_ratings=all` makes pairs of them."
        )
    name = next((name for name in _RATED_PROMPTS if name in row), None)
    if name is None:
        raise DataError(f"{location}: the row has rated completions but no prompt.")
    prompt = text_or_turns(row[name], name, location, "user")
    # Up to "Assistant:", whose turn is what the completions fill.
    if isinstance(prompt, str) and is_dialogue(prompt):
        prompt = dialogue_turns(prompt)[:-1]
    ranked = ranked_pairs(row, location, pair_ratings)
    extras = _extras(row, location)
    weight = weight_of(row, location)
    pairs: list[Pair | TokenizedPair] = []
    for better, worse in ranked:
        sides = _completed(prompt, {**row, "chosen": better.completion, "rejected": worse.completion}, location)
        pairs.append(Pair(*sides, location, *extras, better.score - worse.score, weight))
    return Found(pairs)


def prompt_elsewhere(row: Columns, prompt: Text, location: str) -> str | None:
    """A note where the text of a turn in the `prompt` column is that of no turn of the prompt which was used."""
    said = {turn["content"].strip() for turn in as_turns(prompt, "user")}
    repeated = all(turn["content"].strip() in said for turn in texts(row["prompt"], "prompt", location))
    return None if repeated else PROMPT_ELSEWHERE


def explicit(row: Columns, location: str) -> Sides:
    """`prompt`, `chosen`, `rejected`, each a string or a list of messages."""
    return _completed(text_or_turns(row["prompt"], "prompt", location, "user"), row, location)


def dialogue_before_answers(row: Columns, location: str) -> Sides:
    """A `prompt` that is a dialogue up to "Assistant:", and two answers."""
    return _completed(dialogue_prompt(row["prompt"]), row, location)


def implicit_turns(row: Columns, location: str) -> Sides:
    """Whole conversations in `chosen` and `rejected`; the prompt is the whole turns they share."""
    chosen, rejected = (texts(row[side], side, location) for side in _SIDES)
    return split_turns(chosen, rejected, location)


def dialogues(row: Columns, location: str) -> Sides:
    """Dialogues in strings, "\\n\\nHuman: ...\\n\\nAssistant: ..."; the prompt is the whole turns they share."""
    return split_turns(dialogue_turns(row["chosen"]), dialogue_turns(row["rejected"]), location)


def implicit_text(row: Columns, location: str) -> Sides:
    """Two strings that begin alike; the prompt is the whole words they share."""
    chosen, rejected = (text_of(row[side], side, location) for side in _SIDES)
    return split_words(chosen, rejected, location)


def question(row: Columns, location: str) -> Sides:
    """`question` (or `input`), with an optional `system`."""
    name = "question" if "question" in row else "input"
    return _completed(text_or_turns(row[name], name, location, "user"), row, location)


def alpaca(row: Columns, location: str) -> Sides:
    """`instruction` with an optional `input` below it, and an optional `history` of earlier exchanges."""
    prompt = text_of(row["instruction"], "instruction", location)
    # On a line of its own, as the Alpaca template has it.
    if row.get("input"):
        prompt = f"{prompt}\n{text_of(row['input'], 'input', location)}"
    history = row.get("history") or []
    if not history:
        return _completed(prompt, row, location)
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        raise DataError(f"{location}: 'history' must be a list of [question, answer] pairs.")
    turns = [
        {"role": role, "content": text_of(text, f"history[{number}]", location)}
        for number, exchange in enumerate(history)
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]
    return _completed((*turns, {"role": "user", "content": prompt}), row, location)


def earlier_turns(row: Columns, location: str) -> Sides:
    """`conversations` (or `messages`) so far, and two answers, often single message objects."""
    name = "conversations" if "conversations" in row else "messages"
    return _completed(texts(row[name], name, location), row, location)


def pair_shape(
    name: str,
    fits: Callable[[Columns], bool],
    read: Callable[[Columns, str], Sides],
    note: Callable[[Columns, Text, str], str | None] = lambda *_: None,
) -> Shape:
    """A shape whose rows hold one pair in text, with its tools, template arguments and scores.

    Args:
        name: for reports.
        fits: of a row that has both sides.
        read: `read(row, location)`.
        note: `note(row, prompt, location)`: what to know about how the row was taken.
    """

    def read_pair(row: Columns, location: str, _: str | None) -> Found:
        sides = read(row, location)
        if not isinstance(sides.prompt, str) and sides.prompt[-1]["role"] == "assistant":
            raise DataError(
                f"{location}: the prompt ends with a turn of the assistant, so the answer may be in it already; "
                "expected the user's turn last."
            )
        scored = (margin_of(row, location), weight_of(row, location))
        pair = Pair(*sides, location, *_extras(row, location), *scored)
        return Found([pair], note(row, sides.prompt, location))

    return Shape(name, lambda row: has_sides(row) and fits(row), read_pair)


def has_sides(row: Columns) -> bool:
    """Whether a row has both completions under the usual names."""
    return all(side in row for side in _SIDES)


def has(*names: str) -> Callable[[Columns], bool]:
    """Whether a row has any of these columns."""
    return lambda row: any(name in row for name in names)


def whole_conversations(row: Columns) -> bool:
    """Whether both sides are conversations from their beginning."""
    return all(_is_conversation(row[side]) for side in _SIDES)


def _is_conversation(value: Any) -> bool:
    """Messages that do not begin with the assistant."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    # One message may be an answer alone; a conversation has a question before it.
    first = value[0].get("role", value[0].get("from"))
    return len(value) > 1 and first not in ("assistant", "gpt")


SHAPES = (
    Shape("token ids", has(*itertools.chain(*_ID_COLUMNS)), token_ids),
    Shape("rated completions", lambda row: not has_sides(row) and has(*COMPLETION_LISTS)(row), rated_completions),
    pair_shape(
        "dialogue prompt (hh-rlhf)",
        lambda row: is_dialogue(row.get("prompt")) and not whole_conversations(row),
        dialogue_before_answers,
    ),
    pair_shape(
        "conversations beside a prompt (ultrafeedback_binarized)",
        lambda row: "prompt" in row and whole_conversations(row),
        implicit_turns,
        prompt_elsewhere,
    ),
    pair_shape(
        "strings, explicit prompt",
        lambda row: "prompt" in row and not any(isinstance(row[name], (list, dict)) for name in ("prompt", *_SIDES)),
        explicit,
    ),
    pair_shape("conversational, explicit prompt", has("prompt"), explicit),
    pair_shape("conversational, implicit prompt", whole_conversations, implicit_turns),
    pair_shape("conversations with from and value (ShareGPT)", has("conversations"), earlier_turns),
    pair_shape("instruction and input (Alpaca)", has("instruction"), alpaca),
    pair_shape("question with system (orca_dpo_pairs)", has("question", "input"), question),
    pair_shape("messages and two answers", has("messages"), earlier_turns),
    pair_shape("dialogue strings (hh-rlhf)", lambda row: all(is_dialogue(row[side]) for side in _SIDES), dialogues),
    pair_shape(
        "conversational, implicit prompt",
        lambda row: any(isinstance(row[side], (list, dict)) for side in _SIDES),
        implicit_turns,
    ),
    pair_shape("strings, implicit prompt", lambda row: True, implicit_text),
)
"""In the order in which they are tried: what tells one from the next is often that the earlier does not fit."""


# What several shapes share


def _completed(prompt: Text, row: Columns, location: str) -> Sides:
    """`prompt` with the row's system text and its two sides; where one is in turns, all are."""
    system = row.get("system") or row.get("system_prompt")
    if system:
        prompt = ({"role": "system", "content": text_of(system, "system", location)}, *as_turns(prompt, "user"))
    chosen, rejected = (text_or_turns(row[side], side, location, "assistant") for side in _SIDES)
    for side, text in zip(_SIDES, (chosen, rejected), strict=True):
        # Trained on as an answer, it would teach the model to ask the question.
        if not isinstance(text, str) and text[0]["role"] in ("user", "system"):
            raise DataError(
                f"{location}: {side!r} begins with a turn of the {text[0]['role']}, expected the assistant's."
            )
    if all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        return Sides(prompt, chosen, rejected)
    return Sides(as_turns(prompt, "user"), as_turns(chosen, "assistant"), as_turns(rejected, "assistant"))


_NOT_A_ROWS = (
    "chat_template", "conversation", "messages", "tokenize", "return_dict", "return_tensors", "padding", "truncation",
    "return_assistant_tokens_mask", "max_length", "tokenizer_kwargs", "add_generation_prompt", "continue_final_message",
    "tools",
)  # fmt: skip
"""Arguments of transformers' `apply_chat_template` that are not for the template."""


def _extras(row: Columns, location: str) -> Extras:
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


def _ids(value: Any, name: str, location: str) -> tuple[int, ...]:
    # type() and not isinstance: true and false are whole numbers to the latter.
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise DataError(f"{location}: {name!r} must be a list of token ids (whole numbers from 0).")
    return tuple(value)
