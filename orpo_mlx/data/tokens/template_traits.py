"""What a chat template does with turns, found out by rendering a few: templates say nothing of themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

MARK = "Zq1"
"""A text that no template writes by itself, to find in what one renders."""

_QUESTION = {"role": "user", "content": "Hi"}
_ANSWER = {"role": "assistant", "content": MARK}
_PARAMETERS = {"type": "object", "properties": {}}
_TOOL = {"type": "function", "function": {"name": MARK, "description": "d", "parameters": _PARAMETERS}}
_ARGUMENTS = {MARK: 1}


class TemplateTraits:
    """The traits of one chat template; of one that fails on what is rendered here, what most templates do.

    Args:
        render: `render(turns, add_generation_prompt, arguments)`: turns as text, None where the template fails.
        eos_texts: the texts of the tokenizer's EOS tokens.
    """

    def __init__(
        self, render: Callable[[Sequence[Any], bool, Mapping[str, Any]], str | None], eos_texts: Sequence[str]
    ) -> None:
        self._render = render
        self._eos_texts = eos_texts

    @cached_property
    def wants_parts(self) -> bool:
        """Whether contents must be lists of parts, as in vision-language templates, which leave out plain text."""
        turns = [_QUESTION, _ANSWER]
        return not _shown(self._render(turns, False, {})) and _shown(self._render(in_parts(turns), False, {}))

    @cached_property
    def shows_answers(self) -> bool:
        """Whether the text of the assistant's turn is in what is rendered."""
        return self._answered is None or _shown(self._answered)

    @cached_property
    def folds_system(self) -> bool:
        """Whether the template refuses a system turn, or leaves it out in silence."""
        return not self._shows_first("system")

    @cached_property
    def shows_developer(self) -> bool:
        """Whether the template takes a turn of the developer's, as newer models call a system turn."""
        return self._shows_first("developer")

    @cached_property
    def wants_json_arguments(self) -> bool:
        """Whether the arguments of tool calls must be JSON as text: it joins them to text, as DeepSeek's do."""
        calls = (_call("f", _ARGUMENTS), _call("f", json.dumps(_ARGUMENTS)))
        return [_shown(self._rendered([_QUESTION, call])) for call in calls] == [False, True]

    @cached_property
    def shows_tool_calls(self) -> bool:
        """Whether a tool call is in what is rendered."""
        rendered = self._rendered([_QUESTION, _call(MARK, "{}" if self.wants_json_arguments else {})])
        return rendered is None or _shown(rendered)

    @cached_property
    def asks(self) -> str:
        """What the template writes behind a user's text where an answer is asked for, white space around it aside."""
        rendered = self._rendered([{"role": "user", "content": MARK}], True) or ""
        return rendered.rpartition(MARK)[2].strip()

    @cached_property
    def shows_tools(self) -> bool:
        """Whether descriptions of tools are in what is rendered."""
        rendered = self._rendered([_QUESTION], True, tools=[_TOOL])
        return rendered is None or _shown(rendered)

    @cached_property
    def stray_header(self) -> str:
        """What is written after a finished answer beyond its EOS: the next turn's header, asked for or not."""
        _, eos, rest = self._ending
        # White space after EOS stays: many templates end every turn in a line break, also the last.
        # And so does a further EOS, which some write at the end of a conversation.
        return rest.lstrip() if eos and rest.strip() not in self._eos_texts else ""

    @cached_property
    def closings(self) -> tuple[str, ...]:
        """What may end an answer: an EOS, or what is written from somewhere behind the answer up to its EOS."""
        before, eos, _ = self._ending
        # From anywhere in it, for the end of an answer may share characters with its beginning.
        return (*(before[at:] + eos for at in range(len(before)) if eos), *self._eos_texts)

    @cached_property
    def _ending(self) -> tuple[str, str, str]:
        """What is written behind an answer: up to its first EOS, that, and the rest; without an EOS nothing of use."""
        _, mark, after = (self._answered or "").rpartition(MARK)
        # One that is not there has the whole text before it, so it is not chosen.
        cuts = (after.partition(text) for text in self._eos_texts if mark)
        return min(cuts, key=lambda cut: len(cut[0]), default=("", "", ""))

    def _shows_first(self, role: str) -> bool:
        """Whether a first turn of this role is shown, where an answer is asked for and where there is one.

        Some templates put a system text before the last question, and only where nothing follows that.
        """
        first = {"role": role, "content": MARK}
        for turns, ask in (([_QUESTION], True), ([_QUESTION, {"role": "assistant", "content": "Yes"}], False)):
            # A template that takes nothing is named with the first row.
            if self._rendered(turns, ask) is not None and not _shown(self._rendered([first, *turns], ask)):
                return False
        return True

    @cached_property
    def _answered(self) -> str | None:
        return self._rendered([_QUESTION, _ANSWER])

    def _rendered(self, turns: Sequence[Any], add_generation_prompt: bool = False, **arguments: Any) -> str | None:
        """Turns as text, with contents as the template wants them; None where it fails."""
        return self._render(in_parts(turns) if self.wants_parts else turns, add_generation_prompt, arguments)


def in_parts(turns: Sequence[Any]) -> list[Any]:
    """Turns whose content is a list of one part of text."""
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def _shown(rendered: str | None) -> bool:
    return rendered is not None and MARK in rendered


def _call(name: str, arguments: Any) -> dict[str, Any]:
    # Mistral's templates want an id of nine characters.
    call = {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}
