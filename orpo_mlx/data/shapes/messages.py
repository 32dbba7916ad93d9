"""Values of a row as texts and chat turns, checked: nothing unknown becomes an empty string."""

from __future__ import annotations

import json
import re
from typing import Any

from orpo_mlx.data.shapes.other_rows import OtherRowsError
from orpo_mlx.data.shapes.tool_calls import tool_calls_of
from orpo_mlx.errors import DataError
from orpo_mlx.types import Message, Text

# What data sets call the speakers of a chat, by what chat templates call them. Templates print a name they do not know
# as it stands, where it begins a turn of nobody.
_CALLED = {
    "user": ("human",),
    "assistant": ("gpt", "chatgpt", "bing", "bard", "bot", "ai", "model", "function_call"),
    "tool": ("observation", "function_response"),
}
_ROLES = {name: role for role, names in _CALLED.items() for name in names}
_SPEAKERS = ("system", "developer", "user", "assistant", "tool", "function", *_ROLES)
# Text that begins as messages do when a table's cell holds them: as JSON, or as Python and NumPy print them.
_BRACKET = re.compile(r"""\s*(?:array\()?["\[{]""")
# Quotes may have backslashes before them: those of messages that were put into JSON twice.
_SPEAKER = re.compile(rf"""\\?(["'])(?:role|from)\\?\1\s*:\s*\\?\1(?:{"|".join(_SPEAKERS)})\\?\1""", re.I)


def text_or_turns(value: Any, name: str, location: str, role: str) -> Text:
    """A string as it is; a message or a list of messages as turns.

    Raises:
        DataError: it is neither.
    """
    return text_of(value, name, location) if not isinstance(value, (list, dict)) else texts(value, name, location, role)


def texts(value: Any, name: str, location: str, role: str = "user") -> tuple[Message, ...]:
    """Chat turns: a list of messages, one message, or a string as one turn of `role`.

    Raises:
        DataError: it is something else, or a message is.
    """
    if isinstance(value, str):
        return ({"role": role, "content": text_of(value, name, location)},)
    if isinstance(value, dict):
        return (message(value, name, location),)
    if not isinstance(value, list):
        raise DataError(f"{location}: {name!r} is a JSON {kind(value)}, expected a string or a list of messages.")
    if not value:
        raise DataError(f"{location}: {name!r} is an empty list, expected at least one message.")
    return tuple(message(item, f"{name}[{number}]", location) for number, item in enumerate(value))


def unpacked(value: Any, name: str, location: str) -> Any:
    """Messages that are written as JSON in a text, which is how tables hold them, as messages; all else as it is.

    Raises:
        DataError: a text that is messages, but not in JSON: broken off, or as Python prints them. It would be trained
            on as it stands.
    """
    if not isinstance(value, str) or not _BRACKET.match(value) or not _SPEAKER.search(value):
        return value
    try:
        found = json.loads(value)
        # JSON that was put into JSON once more.
        if isinstance(found, str):
            found = json.loads(found)
    except json.JSONDecodeError as error:
        # A text that begins with an object and goes on is an answer about messages.
        if error.msg.startswith("Extra data"):
            return value
        found = None
    except (ValueError, RecursionError):
        found = None
    if found is None:
        raise DataError(
            f"{location}: {name!r} holds messages as text that is not JSON (broken off, or as Python prints a list), "
            "expected JSON."
        )
    # An answer in JSON may name speakers somewhere within; only a message in front makes the text messages.
    return found if holds_messages(found) else value


def holds_messages(value: Any) -> bool:
    """Whether a value is a message, or a list that begins with one."""
    return _is_message(value[0] if isinstance(value, list) and value else value)


def _is_message(value: Any) -> bool:
    """Whether an object is a turn of somebody who speaks in chats."""
    if not isinstance(value, dict):
        return False
    said = {"content", "tool_calls", "function_call"} if "role" in value else {"value"}
    return speaker_of(value) in _SPEAKERS and bool(said & value.keys())


def speaker_of(value: Any) -> str | None:
    """What chat templates call the speaker of a message, in either of its forms; None where it has none."""
    name = value.get("role", value.get("from")) if isinstance(value, dict) else None
    return _role_of(name) if isinstance(name, str) else None


def message(value: Any, name: str, location: str) -> Message:
    """One chat turn, from `role` and `content` or from ShareGPT's `from` and `value`.

    Raises:
        DataError: it is not a message whose content is text.
    """
    if not isinstance(value, dict):
        raise DataError(f"{location}: {name} is a JSON {kind(value)}, expected a message object.")
    # Libraries that write every key give null where there is none; templates take null for given.
    turn = {key: item for key, item in value.items() if item is not None}
    if "role" not in turn and "from" in turn:
        return _sharegpt_message(turn, name, location)
    role = turn.get("role")
    if not isinstance(role, str):
        raise DataError(f"{location}: {name}.role must be a string, found {_found(turn, 'role')}.")
    turn["role"] = _role_of(role)
    calls = tool_calls_of(turn, name, location)
    content = turn.get("content")
    # OpenAI's form of a turn that only calls tools.
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content[{number}]", location) for number, part in enumerate(content))
    if not isinstance(content, str):
        raise DataError(f"{location}: {name}.content must be a string, found {_found(turn, 'content')}.")
    turn = {**turn, "content": _encodable(content, f"{name}.content", location)}
    return turn if calls is None else {**turn, "tool_calls": calls}


def as_turns(text: Text, role: str) -> tuple[Message, ...]:
    """A string as one turn of `role`; turns as they are."""
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def is_empty(text: Text) -> bool:
    """No character but white space, and no tool call."""
    if isinstance(text, str):
        return not text.strip()
    return not any(turn["content"].strip() or turn.get("tool_calls") for turn in text)


def text_of(value: Any, name: str, location: str) -> str:
    """A string that can be encoded.

    Raises:
        DataError: it is not one.
    """
    if not isinstance(value, str):
        raise DataError(f"{location}: {name!r} is a JSON {kind(value)}, expected a string or a list of messages.")
    return _encodable(value, name, location)


def kind(value: Any) -> str:
    """JSON's name for a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _sharegpt_message(turn: dict[str, Any], name: str, location: str) -> Message:
    said = turn["from"]
    value = turn.get("value")
    if not isinstance(said, str) or not isinstance(value, str):
        raise DataError(f"{location}: {name} must have 'from' and 'value' as strings, found {_found(turn, 'value')}.")
    role = _role_of(said)
    if role not in _SPEAKERS:
        raise DataError(f"{location}: {name}.from is {said[:40]!r}, expected a speaker: {', '.join(_SPEAKERS)}.")
    if said != "function_call":
        return {"role": role, "content": _encodable(value, f"{name}.value", location)}
    try:
        call = json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{location}: {name} is a function call, but its value is not JSON.") from None
    calls = tool_calls_of({"tool_calls": call}, name, location)
    # Inside the envelope that templates expect.
    calls = [each if "function" in each else {"type": "function", "function": each} for each in calls or []]
    return {"role": role, "content": "", "tool_calls": calls}


def _role_of(name: str) -> str:
    """What chat templates call a speaker; a name that is not known here is left to the template, which may know it."""
    plain = name.strip().lower()
    return _ROLES.get(plain, plain if plain in _SPEAKERS else name)


def _part(part: Any, name: str, location: str) -> str:
    """The text of one part of a content that is a list, as vision-language data has it."""
    # The last two are those of OpenAI's Responses.
    texts_of = ("text", "input_text", "output_text")
    if isinstance(part, dict) and part.get("type") in texts_of and isinstance(part.get("text"), str):
        return str(part["text"])
    found = part.get("type", "no type") if isinstance(part, dict) else kind(part)
    raise OtherRowsError(f"{location}: {name} is of type {str(found)[:40]!r}; only text can be trained on here.")


def _found(turn: dict[str, Any], key: str) -> str:
    return kind(turn[key]) if key in turn else "nothing"


def _encodable(text: str, name: str, location: str) -> str:
    # JSON can spell half of a surrogate pair, and Python reads it; tokenizers then fail without naming the row.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ascii(text[error.start])
        raise DataError(f"{location}: {name!r} holds half of a surrogate pair ({code}), which is not text.") from None
    return text
