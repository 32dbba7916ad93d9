"""The shapes of rows that data sets have, recognised by their columns: each turns a row into pairs.

Adding a shape is a function and an entry of `SHAPES` here, and a row in `tests/data/shapes/test_formats.py`. The
first shape that fits reads the row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, NoReturn

from orpo_mlx.data.shapes.columns import (
    COMPLETION_IDS,
    ID_COLUMNS,
    PAIR_ID_COLUMNS,
    PROMPTS,
    Columns,
    WatchedColumns,
    extras,
    is_given,
    readable,
    unused,
    with_system,
)
from orpo_mlx.data.shapes.dialogues import Sides, dialogue_prompt, dialogue_turns, is_dialogue, split_turns, split_words
from orpo_mlx.data.shapes.group_shapes import group_token_ids, labelled_completion, rated_completions
from orpo_mlx.data.shapes.messages import as_turns, kind, speaker_of, text_of, text_or_turns, texts
from orpo_mlx.data.shapes.other_rows import refuse_media, refuse_other_rows
from orpo_mlx.data.shapes.ratings import COMPLETION_LISTS, margin_of, weight_of
from orpo_mlx.data.shapes.row_parts import (
    Found,
    Options,
    RowData,
    check_prompt,
    completed,
    ids_of,
    instruction_prompt,
)
from orpo_mlx.data.shapes.single_shapes import holds_single_completion, holds_text, single_completion, whole_text
from orpo_mlx.errors import DataError
from orpo_mlx.types import Pair, Text, TokenizedPair

PROMPT_ELSEWHERE = "whose prompt column is not a turn of its conversation, which was used"

_SIDES = ("chosen", "rejected")
_EXPECTED = "prompt, chosen and rejected (or prompt_ids, chosen_ids and rejected_ids)"


class ReadRow(NamedTuple):
    """What a row was taken for."""

    shape: str
    pairs: list[RowData]
    """Pairs, or one group."""
    notes: tuple[str, ...]
    """What to know about how the row was taken."""


class Shape(NamedTuple):
    """A kind of row."""

    name: str
    fits: Callable[[Columns], bool]
    read: Callable[[Columns, str, Options], Found]
    """`read(row, location, options)`; raises `DataError` where the row does not hold what its columns say."""


def read_row(
    row: Any,
    location: str,
    *,
    pair_ratings: str | None = None,
    labels: tuple[str, ...] = (),
    one_sided: bool = False,
) -> ReadRow:
    """The pairs, or the group, in a row, whatever its shape; for `pair_ratings` and `labels` see `Options`.

    `one_sided`: whether a single completion, of which nothing else is said, is something to learn from.

    Raises:
        DataError: the row has no known shape, or does not hold what its shape says.
    """
    if not isinstance(row, dict):
        raise DataError(f"{location}: found a JSON {kind(row)}, expected an object with {_EXPECTED}.")
    given = {name: readable(value, name, location) for name, value in row.items() if is_given(value, name)}
    refuse_media(given, location)
    for shape in (SINGLE, WHOLE_TEXT, *SHAPES) if one_sided else SHAPES:
        if shape.fits(given):
            break
    else:
        _refuse(row, given, location, one_sided)
    if shape is SHAPES[-1] and (null := next((name for name in PROMPTS if name in row and name not in given), None)):
        # Or what the answers have in common would be taken for it.
        raise DataError(f"{location}: {null!r} is a JSON null, expected a string or a list of messages.")
    watched = WatchedColumns(given)
    pairs, note = shape.read(watched, location, Options(pair_ratings, labels))
    return ReadRow(shape.name, pairs, tuple(filter(None, (note, unused(given, watched.used)))))


def _refuse(row: Columns, given: Columns, location: str, one_sided: bool) -> NoReturn:
    """Raise what is to be said of a row that is of no shape."""
    for side in _SIDES:
        if side in row and side not in given:
            raise DataError(f"{location}: {side!r} is a JSON null, expected a string or a list of messages.")
    expected = f"prompt and completion, messages, text, or {_EXPECTED}" if one_sided else _EXPECTED
    if not one_sided:
        # These advise a method of one side, which is given then.
        refuse_other_rows(given, location)
    missing = [name for name in _SIDES if name not in row]
    found = ", ".join(sorted(map(str, row))[:8]) or "no keys"
    raise DataError(
        f"{location}: the row has no {' and no '.join(map(repr, missing))}; found {found}, expected {expected}; "
        f"`columns={missing[0]}=NAME` says which column it is."
    )


# What each shape's columns hold


def token_ids(row: Columns, location: str, _: Options) -> Found:
    """Token ids of prompt and sides, taken as they are."""
    columns = next(names for names in ID_COLUMNS if any(name in row for name in names))
    missing = [name for name in columns if name not in row]
    if missing:
        raise DataError(
            f"{location}: the row has no {' and no '.join(map(repr, missing))}; expected {', '.join(columns)}."
        )
    prompt, chosen, rejected = (ids_of(row[name], name, location) for name in columns)
    scored = (margin_of(row, location), weight_of(row, location))
    return Found([TokenizedPair(prompt, chosen, rejected, location, *scored)])


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
    """`instruction`, with what goes with it."""
    return _completed(instruction_prompt(row, location), row, location)


def earlier_turns(row: Columns, location: str) -> Sides:
    """`conversations` (or `messages`) so far, and two answers, often single message objects."""
    name = "conversations" if "conversations" in row else "messages"
    return _completed(texts(row[name], name, location), row, location)


def openai_preference(row: Columns, location: str, options: Options) -> Found:
    """`input` with messages and tools, `preferred_output` and `non_preferred_output`."""
    asked = row["input"]
    if not isinstance(asked, dict) or "messages" not in asked:
        raise DataError(f"{location}: 'input' must be an object with messages beside preferred_output.")
    given = {name: asked[name] for name in ("messages", "tools") if asked.get(name) is not None}
    sides = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return _TWO_ANSWERS.read({**_rest(row, _OPENAI), **given, **sides}, location, options)


def rejected_response(row: Columns, location: str, options: Options) -> Found:
    """`messages` that end in the better answer, and the worse one by itself or in a conversation of its own."""
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{location}: 'messages' must be a conversation that ends in the better answer.")
    name = next(name for name in _SWIFT if name in row)
    rest = _rest(row, ("messages", *_SWIFT))
    if name == "rejected_messages":
        return _CONVERSATIONS.read({**rest, "chosen": messages, "rejected": row[name]}, location, options)
    sides = {"chosen": messages[-1:], "rejected": row[name]}
    return _TWO_ANSWERS.read({**rest, "messages": messages[:-1], **sides}, location, options)


def _rest(row: Columns, names: Collection[str]) -> dict[str, Any]:
    return {name: row[name] for name in row if name not in names}


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

    def read_pair(row: Columns, location: str, _: Options) -> Found:
        sides = read(row, location)
        prompt = with_system(sides.prompt, row, location)
        # By identity: `with_system` returns the very prompt where it has nothing to add.
        if prompt is not sides.prompt:
            sides = Sides(prompt, as_turns(sides.chosen, "assistant"), as_turns(sides.rejected, "assistant"))
        check_prompt(sides.prompt, location)
        scored = (margin_of(row, location), weight_of(row, location))
        pair = Pair(*sides, location, *extras(row, location), *scored, divided_text=read is implicit_text)
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
    return len(value) > 1 and speaker_of(value[0]) != "assistant"


SINGLE = Shape("single completions", holds_single_completion, single_completion)
"""Read where the method looks at one side alone: it would otherwise hide that a column has another name."""

WHOLE_TEXT = Shape("texts", holds_text, whole_text)
"""Read under the same condition."""

_CONVERSATIONS = pair_shape("conversational, implicit prompt", whole_conversations, implicit_turns)
_TWO_ANSWERS = pair_shape("messages and two answers", has("messages"), earlier_turns)
# Columns of OpenAI's preference fine-tuning, and those in which ms-swift has the worse side.
_OPENAI = ("input", "preferred_output", "non_preferred_output")
_SWIFT = ("rejected_response", "rejected_messages")

SHAPES = (
    Shape("preferred output (OpenAI)", lambda row: all(name in row for name in _OPENAI), openai_preference),
    Shape(
        "messages and a rejected response (ms-swift)",
        lambda row: "messages" in row and not has_sides(row) and has(*_SWIFT)(row),
        rejected_response,
    ),
    # Before the next one, which any row with prompt_ids fits, as these rows do.
    Shape("token ids of completions", lambda row: COMPLETION_IDS in row, group_token_ids),
    # One of the columns is enough, so that a row that lacks another is told which.
    Shape("token ids", has(*PAIR_ID_COLUMNS), token_ids),
    Shape(
        "labelled completion",
        lambda row: "label" in row and not has_sides(row) and not has(*COMPLETION_LISTS)(row),
        labelled_completion,
    ),
    Shape("rated completions", lambda row: not has_sides(row) and has(*COMPLETION_LISTS)(row), rated_completions),
    # A dialogue beside whole conversations is only their beginning once more: that is the next shape.
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
    _CONVERSATIONS,
    pair_shape("conversations with from and value (ShareGPT)", has("conversations"), earlier_turns),
    pair_shape("instruction and input (Alpaca)", has("instruction"), alpaca),
    pair_shape("question with system (orca_dpo_pairs)", has("question", "input"), question),
    _TWO_ANSWERS,
    pair_shape("dialogue strings (hh-rlhf)", lambda row: all(is_dialogue(row[side]) for side in _SIDES), dialogues),
    # What is left of turns once every shape with a prompt column is tried: the prompt can only be in them.
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
    """`prompt` and the row's two sides, see `completed`."""
    prompt, sides = completed(prompt, [row[side] for side in _SIDES], _SIDES, row, location)
    return Sides(prompt, *sides)
