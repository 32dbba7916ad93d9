"""The shapes of rows that data sets have, recognised by their columns: each turns a row into `Pair`s.

Adding a shape is a function and a line in `SHAPES`. The first whose columns fit reads the row.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.data.messages import as_turns, kind, text_of, text_or_turns, texts
from orpo_mlx.errors import DataError
from orpo_mlx.types import Message, Pair, Text, TokenizedPair

PAIRINGS = ("best_worst", "all")
"""How a row of rated completions becomes pairs."""

COLUMNS = (
    *("prompt", "chosen", "rejected", "system", "question", "instruction", "input", "history", "conversations"),
    *("messages", "tools", "chat_template_kwargs", "completions", "scores", "score_chosen", "score_rejected"),
    *("prompt_ids", "chosen_ids", "rejected_ids"),
)
"""Names that a data set's own columns can be given."""

PROMPT_ELSEWHERE = "whose prompt column is not a turn of its conversation, which was used"

_ID_COLUMNS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
)
_SIDES = ("chosen", "rejected")
_SCORES = [
    (pattern.format("chosen"), pattern.format("rejected"))
    for pattern in ("score_{}", "{}_score", "rating_{}", "{}_rating", "{}-rating", "{}_avg_rating", "{}_reward")
]
_LISTS = ("completions", "responses", "answers", "generations")
_LIST_SCORES = ("scores", "ratings", "rewards", "ranks")
_ENTRY_TEXT = ("response", "completion", "content", "text", "answer", "generation")
_ENTRY_SCORE = ("score", "rating", "overall_score", "reward", "rank")
_DIALOGUE = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):[ \t]*")
_DIALOGUE_ROLES = {"Human": "user", "Assistant": "assistant"}


class ReadRow(NamedTuple):
    """What a row was taken for."""

    shape: str
    pairs: list[Pair | TokenizedPair]
    note: str | None = None
    """Something to know about how it was taken."""


class _Shape(NamedTuple):
    name: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], str], tuple[Text, Text, Text]]
    """Prompt, chosen and rejected of a row at a location."""


def read_row(row: Any, location: str, *, pair_ratings: str | None = None) -> ReadRow:
    """The pairs in a row, whatever its shape; `pair_ratings` is one of `PAIRINGS`.

    Raises:
        DataError: the row has no known shape, or does not hold what its shape says.
    """
    if not isinstance(row, dict):
        raise DataError(f"{location}: found a JSON {kind(row)}, expected an object with {_expected()}.")
    for columns in _ID_COLUMNS:
        if any(name in row for name in columns):
            return ReadRow("token ids", [_token_ids(row, columns, location)])
    if not all(side in row for side in _SIDES) and any(name in row for name in _LISTS):
        return ReadRow("rated completions", list(_rated_pairs(row, location, pair_ratings)))
    missing = [name for name in _SIDES if name not in row]
    if missing:
        found = ", ".join(sorted(map(str, row))[:8]) or "no keys"
        raise DataError(
            f"{location}: the row has no {' and no '.join(map(repr, missing))}; found {found}, expected {_expected()}; "
            f"--columns {missing[0]}=NAME says which column it is."
        )
    shape = next(shape for shape in SHAPES if shape.fits(row))
    prompt, chosen, rejected = shape.read(row, location)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{location}: the prompt ends with a turn of the assistant, so the answer may be in it already; expected "
            "the user's turn last."
        )
    extras = _extras(row, location)
    note = None
    if shape.read is _conversations_beside_prompt and not _among(prompt, row["prompt"], location):
        note = PROMPT_ELSEWHERE
    return ReadRow(shape.name, [Pair(prompt, chosen, rejected, location, *extras, _margin(row, location))], note)


# Each shape's columns, and what they hold ----------------------------------------------------------------------------


def _explicit(row: Mapping[str, Any], location: str) -> tuple[Text, Text, Text]:
    """`prompt`, `chosen`, `rejected`, each a string or a list of messages."""
    return _completed(text_or_turns(row["prompt"], "prompt", location, "user"), row, location)


def _dialogue_prompt(row: Mapping[str, Any], location: str) -> tuple[Text, Text, Text]:
    """A `prompt` that is a dialogue up to "Assistant:", and two answers."""
    turns = _dialogue(row["prompt"])
    return _completed(turns[:-1] if turns[-1]["content"] == "" else turns, row, location)


def _conversations_beside_prompt(row: Mapping[str, Any], location: str) -> tuple[Text, Text, Text]:
    """Whole conversations in `chosen` and `rejected`, and the question once more in `prompt`."""
    return _implicit_turns(row, location)


def _implicit_turns(row: Mapping[str, Any], location: str) -> tuple[Text, Text, Text]:
    """Whole conversations in `chosen` and `rejected`; the prompt is the whole turns they share."""
    return _split_turns(
        texts(row["chosen"], "chosen", location), texts(row["rejected"], "rejected", location), location
    )


def _dialogues(row: Mapping[str, Any], location: str) -> tuple[Text, Text, Text]:
    """Dialogues in strings, "\\n\\nHuman: ...\\n\\nAssistant: ..."; the prompt is the whole turns they share."""
    return _split_turns(_dialogue(row["chosen"]), _dialogue(row["rejected"]), location)


def _implicit_text(row: Mapping[str, Any], location: str) -> tuple[Text, Text, Text]:
    """Two strings that begin alike; the prompt is the whole words they share."""
    chosen, rejected = (text_of(row[side], side, location) for side in _SIDES)
    shared = _shared_words(chosen, rejected)
    if not shared.strip():
        raise DataError(f"{location}: there is no prompt, and chosen and rejected do not begin with the same words.")
    return shared, chosen[len(shared) :], rejected[len(shared) :]


def _question(row: Mapping[str, Any], location: str) -> tuple[Text, Text, Text]:
    """`question` (or `input`), with an optional `system`."""
    name = "question" if "question" in row else "input"
    return _completed(text_or_turns(row[name], name, location, "user"), row, location)


def _alpaca(row: Mapping[str, Any], location: str) -> tuple[Text, Text, Text]:
    """`instruction` with an optional `input` below it, and an optional `history` of earlier exchanges."""
    prompt = text_of(row["instruction"], "instruction", location)
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


def _sharegpt(row: Mapping[str, Any], location: str) -> tuple[Text, Text, Text]:
    """`conversations` (or `messages`) so far, and two answers, often single message objects."""
    name = "conversations" if "conversations" in row else "messages"
    return _completed(texts(row[name], name, location), row, location)


def _anything(_: Mapping[str, Any]) -> bool:
    return True


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: any(name in row for name in names)


def _is_conversation(value: Any) -> bool:
    """Messages that do not begin with the assistant."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    first = value[0].get("role", value[0].get("from"))
    return len(value) > 1 and first not in ("assistant", "gpt")


def _whole(row: Mapping[str, Any]) -> bool:
    return all(_is_conversation(row[side]) for side in _SIDES)


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


SHAPES = (
    _Shape(
        "dialogue prompt (hh-rlhf)", lambda row: _is_dialogue(row.get("prompt")) and not _whole(row), _dialogue_prompt
    ),
    _Shape(
        "conversations beside a prompt (ultrafeedback_binarized)",
        lambda row: "prompt" in row and _whole(row),
        _conversations_beside_prompt,
    ),
    _Shape(
        "strings, explicit prompt",
        lambda row: "prompt" in row and not any(isinstance(row[name], (list, dict)) for name in ("prompt", *_SIDES)),
        _explicit,
    ),
    _Shape("conversational, explicit prompt", _has("prompt"), _explicit),
    _Shape("conversational, implicit prompt", _whole, _implicit_turns),
    _Shape("conversations with from and value (ShareGPT)", _has("conversations"), _sharegpt),
    _Shape("instruction and input (Alpaca)", _has("instruction"), _alpaca),
    _Shape("question with system (orca_dpo_pairs)", _has("question", "input"), _question),
    _Shape("messages and two answers", _has("messages"), _sharegpt),
    _Shape("dialogue strings (hh-rlhf)", lambda row: all(_is_dialogue(row[side]) for side in _SIDES), _dialogues),
    _Shape(
        "conversational, implicit prompt",
        lambda row: any(isinstance(row[side], (list, dict)) for side in _SIDES),
        _implicit_turns,
    ),
    _Shape("strings, implicit prompt", _anything, _implicit_text),
)


# Pieces they share ---------------------------------------------------------------------------------------------------


def _expected() -> str:
    return "prompt, chosen and rejected (or prompt_ids, chosen_ids and rejected_ids)"


def _completed(prompt: Text, row: Mapping[str, Any], location: str) -> tuple[Text, Text, Text]:
    """`prompt` with the row's system text and its two sides; where one is in turns, all are."""
    system = row.get("system") or row.get("system_prompt")
    if system:
        prompt = ({"role": "system", "content": text_of(system, "system", location)}, *as_turns(prompt, "user"))
    chosen, rejected = (text_or_turns(row[side], side, location, "assistant") for side in _SIDES)
    for side, text in zip(_SIDES, (chosen, rejected), strict=True):
        if not isinstance(text, str) and text[0]["role"] in ("user", "system"):
            raise DataError(
                f"{location}: {side!r} begins with a turn of the {text[0]['role']}, expected the assistant's."
            )
    if all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        return prompt, chosen, rejected
    return as_turns(prompt, "user"), as_turns(chosen, "assistant"), as_turns(rejected, "assistant")


def _split_turns(chosen: tuple[Message, ...], rejected: tuple[Message, ...], location: str) -> tuple[Text, Text, Text]:
    """Two conversations as the whole turns they share, up to an answer, and what each adds."""
    pairs = itertools.takewhile(lambda turns: turns[0] == turns[1], zip(chosen, rejected, strict=False))
    shared = sum(1 for _ in pairs)
    # Equal conversations differ nowhere: their last answer is then the side, so that they count as equal sides.
    shared = min(shared, len(chosen) - 1, len(rejected) - 1) if chosen == rejected else shared
    if shared == 0:
        raise DataError(f"{location}: there is no prompt, and chosen and rejected share no first turn.")
    for side, turns in zip(_SIDES, (chosen, rejected), strict=True):
        if len(turns) > shared and turns[shared]["role"] != "assistant":
            role = turns[shared]["role"]
            raise DataError(
                f"{location}: {side}[{shared}], the first turn that differs, is of role {role!r}, "
                "expected the assistant's."
            )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _dialogue(text: str) -> tuple[Message, ...]:
    """The turns of a string of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    pieces = _DIALOGUE.split(text.strip())[1:]
    return tuple(
        {"role": _DIALOGUE_ROLES[who], "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    )


def _shared_words(first: str, second: str) -> str:
    """The longest common beginning that ends where a word ends in both, without the white space after it."""
    length = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))
    inside = any(
        text[length - 1 : length].isalnum() and text[length : length + 1].isalnum() for text in (first, second)
    )
    while inside and length and first[length - 1].isalnum():
        length -= 1
    return first[:length].rstrip()


def _among(turns: Text, prompt: Any, location: str) -> bool:
    """Whether the text of every turn of `prompt` is that of one of `turns`."""
    said = {turn["content"].strip() for turn in as_turns(turns, "user")}
    return all(turn["content"].strip() in said for turn in texts(prompt, "prompt", location))


def _extras(row: Mapping[str, Any], location: str) -> tuple[tuple[Mapping[str, Any], ...], Mapping[str, Any]]:
    """The row's `tools` and `chat_template_kwargs`."""
    tools = _from_json(row.get("tools"), "tools", location) or []
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{location}: 'tools' must be a list of tool descriptions (objects).")
    arguments = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs", location) or {}
    if not isinstance(arguments, dict):
        raise DataError(f"{location}: 'chat_template_kwargs' must be an object.")
    return tuple(_without_nulls(tool) for tool in tools), _without_nulls(arguments)


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


def _margin(row: Mapping[str, Any], location: str) -> float | None:
    for names in _SCORES:
        if row.get(names[0]) is not None and row.get(names[1]) is not None:
            chosen, rejected = (_score(row[name], name, location) for name in names)
            return chosen - rejected
    return None


def _score(value: Any, name: str, location: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{location}: {name!r} must be a number, found {kind(value)} {str(value)[:40]!r}.") from None
    if number != number:
        raise DataError(f"{location}: {name!r} is not a number (NaN).")
    return number


def _rated_pairs(row: Mapping[str, Any], location: str, pairing: str | None) -> list[Pair]:
    """Pairs out of a list of rated completions of one prompt."""
    if pairing is None:
        raise DataError(
            f"{location}: the row holds a list of rated completions, expected chosen and rejected; "
            "in train and inspect, --pair-ratings best_worst or --pair-ratings all makes pairs of them."
        )
    name = next((name for name in ("prompt", "instruction", "question", "messages") if name in row), None)
    if name is None:
        raise DataError(f"{location}: the row has rated completions but no prompt.")
    prompt = text_or_turns(row[name], name, location, "user")
    prompt = _dialogue(prompt)[:-1] if _is_dialogue(prompt) and isinstance(prompt, str) else prompt
    rated = sorted(_rated(row, location), key=lambda entry: -entry[1])
    ends = [(rated[0], rated[-1])] if pairing == "best_worst" else itertools.combinations(rated, 2)
    extras = _extras(row, location)
    pairs = []
    for (chosen, high), (rejected, low) in ends:
        if high > low:
            sides = _completed(prompt, {**row, "chosen": chosen, "rejected": rejected}, location)
            pairs.append(Pair(*sides, location, *extras, high - low))
    return pairs


def _rated(row: Mapping[str, Any], location: str) -> list[tuple[Any, float]]:
    """Completions with their scores; a rank counts from the best."""
    name = next(name for name in _LISTS if name in row)
    entries = row[name]
    if not isinstance(entries, list) or len(entries) < 2:
        raise DataError(f"{location}: {name!r} must be a list of at least two completions.")
    if all(isinstance(entry, dict) for entry in entries):
        text = next((key for key in _ENTRY_TEXT if all(key in entry for entry in entries)), None)
        score = next((key for key in _ENTRY_SCORE if all(key in entry for entry in entries)), None)
        if text is None or score is None:
            found = ", ".join(map(str, entries[0]))
            raise DataError(
                f"{location}: {name}[0] has {found}; expected a text ({', '.join(_ENTRY_TEXT)}) and a "
                f"score ({', '.join(_ENTRY_SCORE)})."
            )
        bodies = [entry[text] for entry in entries]
        scores: Any = [entry[score] for entry in entries]
    else:
        score = next((key for key in _LIST_SCORES if key in row), None)
        scores = row[score] if score is not None else None
        if not isinstance(scores, list) or len(scores) != len(entries):
            raise DataError(
                f"{location}: {name!r} needs a list of as many scores ({', '.join(_LIST_SCORES)}) beside it."
            )
        bodies = entries
    sign = -1.0 if score in ("rank", "ranks") else 1.0
    return [
        (body, sign * _score(value, f"{name} {score}", location)) for body, value in zip(bodies, scores, strict=True)
    ]


def _token_ids(row: Mapping[str, Any], columns: Sequence[str], location: str) -> TokenizedPair:
    missing = [name for name in columns if name not in row]
    if missing:
        raise DataError(
            f"{location}: the row has no {' and no '.join(map(repr, missing))}; expected {', '.join(columns)}."
        )
    prompt, chosen, rejected = (_ids(row[name], name, location) for name in columns)
    return TokenizedPair(prompt, chosen, rejected, location)


def _ids(value: Any, name: str, location: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise DataError(f"{location}: {name!r} must be a list of token ids (whole numbers from 0).")
    return tuple(value)
