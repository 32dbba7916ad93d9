"""Tools and calls of them as objects, however a data set spells them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orpo_mlx.errors import DataError


def tool_calls_of(turn: dict[str, Any], name: str, location: str) -> list[Any] | None:
    """A turn's tool calls, with arguments as objects; None where it has none. Takes `function_call` out of the turn."""
    calls = from_json(turn.get("tool_calls"), f"{name}.tool_calls", location)
    # OpenAI's older name for a single call, which templates do not know: they would leave the call out.
    old = from_json(turn.pop("function_call", None), f"{name}.function_call", location)
    if calls is None and old is None:
        turn.pop("tool_calls", None)
        return None
    calls = [calls] if isinstance(calls, dict) else (calls or [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in (*calls, old or {})):
        raise DataError(f"{location}: {name}.tool_calls must be a list of calls (objects).")
    if old is not None:
        calls = [*calls, {"type": "function", "function": old}]
    return [_tool_call(call, name, location) for call in calls]


def _tool_call(call: dict[str, Any], name: str, location: str) -> dict[str, Any]:
    """A call with its arguments as an object, whether OpenAI's envelope is around it or not."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _tool_call(call["function"], name, location)}
    arguments = call.get("arguments")
    if arguments is None and "name" in call:
        # Of a function that takes none; templates that write them fail where the key is not there.
        return {**call, "arguments": {}}
    plain_json(arguments, f"{name}.tool_calls", location)
    if not isinstance(arguments, str):
        return call
    # OpenAI's API has them as JSON in a string, which templates would encode once more. What a model wrote as
    # arguments that are no object stays as it is: it may be what is wrong with a rejected side.
    try:
        found = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": found} if isinstance(found, dict) else call


def tool_description(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool whose parameters are an object, where a table has them as JSON in a string."""
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": tool_description(tool["function"])}
    if not isinstance(tool.get("parameters"), str):
        return tool
    try:
        found = json.loads(tool["parameters"])
    except (ValueError, RecursionError):
        return tool
    return {**tool, "parameters": found} if isinstance(found, dict) else tool


def with_json_arguments(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn whose tool calls have their arguments as JSON in a string, as OpenAI's API gives them."""
    # Templates may ask whether the key is there.
    calls = turn.get("tool_calls")
    return {**turn, "tool_calls": [_in_text(call) for call in calls]} if calls else {**turn}


def _in_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _in_text(call["function"])}
    given = call.get("arguments")
    # Characters as they are: escapes such as \u00e9 would be trained on in their place.
    return {**call, "arguments": json.dumps(given, ensure_ascii=False)} if isinstance(given, (dict, list)) else call


def from_json(value: Any, name: str, location: str) -> Any:
    """What a text holds as JSON, None where it is empty; any other value as it is.

    Raises:
        DataError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{location}: {name!r} is text but not JSON.") from None


def plain_json(value: Any, name: str, location: str) -> Any:
    """The value, where it is one that JSON has.

    Raises:
        DataError: a part of it is something else, such as the times that some readers of JSON take dates for.
    """
    # No recursion, so that no depth of nesting raises RecursionError here.
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif item is not None and not isinstance(item, (str, int, float, bool)):
            raise DataError(
                f"{location}: {name!r} holds a {type(item).__name__}, which JSON does not have; make it text."
            )
    return value
