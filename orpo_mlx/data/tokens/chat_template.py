"""A pair rendered as text: by the tokenizer's chat template, or as plain strings where it has none."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.data.shapes.messages import as_turns
from orpo_mlx.data.shapes.tool_calls import with_json_arguments
from orpo_mlx.data.tokens.bounded_templates import TemplateLimitError, bound_templates, bounded_time, check_length
from orpo_mlx.data.tokens.template_traits import MARK, TemplateTraits, in_parts
from orpo_mlx.data.tokens.trained_turns import Stretch, learned_stretches
from orpo_mlx.errors import DataError, ModelError, reason_of
from orpo_mlx.text import printable
from orpo_mlx.types import Group, Message, Pair, Text

TOOLS_LEFT_OUT = "without its tools, which the chat template leaves out"
CALLS_LEFT_OUT = "without its earlier tool calls, which the chat template leaves out"
TEMPLATED_TWICE = (
    "whose prompt has the marks of the chat template in it and was put into the template once more "
    "(`template_strings=False` takes strings as they stand)"
)
SYSTEM_FOLDED = (
    "with the system text put into the next turn, since the chat template has no system role or shows it only where no "
    "answer follows"
)
DEVELOPER_RENAMED = "with a developer's turn as a system turn, since the chat template has no developer role"
PROMPT_WORDS_LEFT_OUT = "without some words of the prompt, which the chat template leaves out or changes"
CALL_LEFT_OUT = "without a tool call of an answer, which the chat template leaves out"
WORDS_LEFT_OUT = "without some words of an answer, which the chat template leaves out or changes"
THOUGHT_LEFT_OUT = "without a thought of an answer, which the chat template leaves out"

# Two answers that begin with different characters, so that what one shares with a header by chance, the other does not.
_PROBES = (MARK, "0")

# Keys beside a content under which models' thoughts are kept.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")

# Characters of a note that quotes a template.
_SHOWN = 40


class RenderedTexts(NamedTuple):
    """A row's texts as the model reads them."""

    prompt: str
    """Up to where the completions begin."""
    whole: tuple[str, ...]
    """Prompt and completion, of each completion."""
    templated: bool = False
    """Whether a chat template made them, which writes special tokens itself."""
    notes: tuple[str, ...] = ()
    """What to know about how the template takes the row."""
    learned: tuple[list[Stretch] | None, ...] = ()
    """Of each of these what is learned behind the prompt, None for all of it; empty where that holds for each."""


class PairRenderer:
    """Renders pairs for one tokenizer.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, or None for a model folder without one, for which nothing can be
            rendered.
        eos_texts: the texts of its EOS tokens.
        template_strings: whether strings are put into the chat template, as one turn of the user and one of the
            assistant; conversations always are.
    """

    def __init__(self, tokenizer: Any | None, eos_texts: Sequence[str], *, template_strings: bool = True) -> None:
        self._tokenizer = tokenizer
        self._eos_texts = eos_texts
        self._template_strings = template_strings
        self._model = getattr(tokenizer, "name_or_path", None) or "the model"
        if tokenizer is not None:
            bound_templates()
        self.has_template = tokenizer is not None and tokenizer.has_chat_template
        self._traits = TemplateTraits(self._probe, eos_texts)

    def texts(self, row: Pair | Group, train_on: str = "all") -> RenderedTexts:
        """The texts of the prompt and of prompt + completion; `train_on` is one of `TRAINED_TURNS`.

        Raises:
            DataError: no tokenizer, a conversation without a chat template, a template that fails, or one that writes
                the turns of the prompt otherwise once an answer follows.
        """
        prompt = self.prompt(row)
        whole = tuple(self._whole(row, prompt, completion) for completion in row.completions)
        texts = RenderedTexts(prompt, whole, self.is_templated(row))
        if not texts.templated:
            return texts
        if not all(text.startswith(prompt) for text in whole):
            texts = self._with_shared_prompt(row, texts)
        learned = [
            self._learned(row, texts.prompt, *both, train_on) for both in zip(row.completions, whole, strict=True)
        ]
        return texts._replace(notes=(*texts.notes, *self._left_out(row, texts)), learned=tuple(learned))

    def prompt(self, pair: Pair | Group) -> str:
        """The text of a row's prompt alone, up to where generation would start.

        Raises:
            DataError: see `texts`.
        """
        if self._tokenizer is None:
            raise DataError(
                f"{pair.location}: the row is text but the model has no tokenizer; give prompt_ids, chosen_ids and "
                "rejected_ids."
            )
        if not self.is_templated(pair):
            return _plain(pair.prompt, pair.location)
        return self._render(pair, as_turns(pair.prompt, "user"), add_generation_prompt=True)

    def is_templated(self, pair: Pair | Group) -> bool:
        """Whether the chat template writes a row's texts."""
        strings = all(isinstance(text, str) for text in (pair.prompt, *pair.completions))
        return self.has_template and (self._template_strings or not strings) and not pair.whole_text

    def _whole(self, pair: Pair | Group, prompt: str, side: Text) -> str:
        if not self.is_templated(pair):
            return prompt + _plain(self._without_eos(side), pair.location)
        if not self._traits.shows_answers:
            raise DataError(
                f"{pair.location}: the chat template leaves out the assistant's text; use another template."
            )
        turns = (*as_turns(pair.prompt, "user"), *self._answer(pair, side))
        return self._render(pair, turns, add_generation_prompt=False).removesuffix(self._traits.stray_header)

    def _with_shared_prompt(self, pair: Pair | Group, texts: RenderedTexts) -> RenderedTexts:
        """`texts` with the prompt cut back to what any answer follows.

        Templates of models that reason write the beginning of a thought where an answer is asked for, and none before
        an answer that has no thought, or whose thought a later turn made them strip.
        """
        turns = as_turns(pair.prompt, "user")
        probes = [
            self._render(pair, (*turns, {"role": "assistant", "content": text}), add_generation_prompt=False)
            for text in _PROBES
        ]
        end = min(_common_length(texts.prompt, text) for text in (*texts.whole, *probes))
        least = self._end_of_turns(pair, texts.prompt)
        if end < least:
            raise DataError(
                f"{pair.location}: the chat template renders the prompt differently once the answer follows, so the "
                "boundary between them is unknown; use a template that does not rewrite earlier turns, or token ids."
            )
        end = _between_marks(texts.prompt, least, end)
        left_out = printable(texts.prompt[end:].replace("\n", "↵"))[:_SHOWN]
        note = f"whose prompt ends before {left_out}, which the chat template writes only where an answer is asked for"
        return texts._replace(prompt=texts.prompt[:end], notes=(note,))

    def _left_out(self, pair: Pair | Group, texts: RenderedTexts) -> Iterator[str]:
        """Notes of what the template does not write, or writes twice.

        Raises:
            DataError: of a completion that is a tool call nothing is left.
        """
        # Three letters are no mark: a template may write no more than a colon.
        if isinstance(pair.prompt, str) and len(self._traits.asks) > 3 and self._traits.asks in pair.prompt:
            yield TEMPLATED_TWICE
        if pair.tools and not self._traits.shows_tools:
            yield TOOLS_LEFT_OUT
        asked = as_turns(pair.prompt, "user")
        if any(map(_called, asked)) and not self._traits.shows_tool_calls:
            yield CALLS_LEFT_OUT
        every = (*asked, *(turn for side in pair.completions for turn in as_turns(side, "assistant")))
        if any(turn["role"] == "developer" for turn in every) and not self._traits.shows_developer:
            yield DEVELOPER_RENAMED
        if self._with_known_roles(asked[:1])[0]["role"] == "system" and self._traits.folds_system:
            yield SYSTEM_FOLDED
        # Thoughts of earlier turns are no loss: templates leave them out where the model is asked as well.
        words = [part for turn in asked for note, part in _spoken(turn) if note == WORDS_LEFT_OUT]
        if not all(_holds(texts.prompt, part) for part in words):
            yield PROMPT_WORDS_LEFT_OUT
        said: list[str] = []
        for side, text in zip(pair.completions, texts.whole, strict=True):
            completion = text[len(texts.prompt) :]
            turns = self._answer(pair, side)
            if any(name not in completion for turn in turns for name in _called(turn)):
                if not any(turn["content"].strip() for turn in turns if turn["role"] == "assistant"):
                    raise DataError(
                        f"{pair.location}: the chat template leaves out the tool call that is the answer; use one that "
                        "knows tools."
                    )
                said.append(CALL_LEFT_OUT)
            said += [note for turn in turns for note, part in _spoken(turn) if not _holds(completion, part)]
        yield from dict.fromkeys(said)

    def _end_of_turns(self, pair: Pair | Group, prompt: str) -> int:
        """Where the last turn ends in the text of a prompt: what comes after it is the template's own."""
        turns = as_turns(pair.prompt, "user")
        content = turns[-1]["content"].strip()
        most = _common_length(prompt, self._render(pair, turns, add_generation_prompt=False))
        # Before the header, in which a short content may stand by chance: "hi" in <think>.
        found = prompt.rfind(content, 0, most) if content else -1
        if found < 0 and content:
            # Where the template writes the turns themselves otherwise, all of the content is the prompt's.
            found = prompt.rfind(content)
        # A template may have changed the content; then, what it writes where it asks for no answer.
        return found + len(content) if found >= 0 else most

    def _learned(self, row: Pair | Group, prompt: str, side: Text, text: str, train_on: str) -> list[Stretch] | None:
        if isinstance(side, str):
            return None
        turns = self._answer(row, side)

        def render(turns: Sequence[Message], add_generation_prompt: bool) -> str:
            rendered = self._render(row, turns, add_generation_prompt=add_generation_prompt)
            return rendered if add_generation_prompt else rendered.removesuffix(self._traits.stray_header)

        before = as_turns(row.prompt, "user")
        return learned_stretches(render, before, turns, text, len(prompt), train_on, self._traits.closings)

    def _render(self, pair: Pair | Group, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        turns = self._as_wanted(messages)
        extras = {"tools": [dict(tool) for tool in pair.tools] or None, **pair.template_kwargs}
        try:
            return self._apply(turns, add_generation_prompt, extras)
        except TemplateLimitError as error:
            # The model's fault and not the row's: to leave the row out would be to wait as long for the next one.
            raise ModelError(f"{self._model}: its chat template cannot be used on {pair.location}: {error}.") from None
        except Exception as error:  # Templates raise whatever they like, jinja2's errors among others.
            roles = ", ".join(str(turn.get("role")) for turn in turns)
            reason = reason_of(error, first_line=True)
            raise DataError(f"{pair.location}: the chat template refused the turns ({roles}): {reason}.") from error

    def _as_wanted(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Turns in the form that the template takes."""
        turns = self._with_known_roles(messages)
        if any(turn.get("tool_calls") for turn in turns) and self._traits.wants_json_arguments:
            turns = [with_json_arguments(turn) for turn in turns]
        if turns[0]["role"] == "system" and self._traits.folds_system:
            turns = folded(turns)
        return in_parts(turns) if self._traits.wants_parts else turns

    def _with_known_roles(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The turns, the developer's as system turns where the template does not show them otherwise."""
        turns = [dict(message) for message in messages]
        if all(turn["role"] != "developer" for turn in turns) or self._traits.shows_developer:
            return turns
        return [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]

    def _apply(
        self, turns: Sequence[Message], add_generation_prompt: bool, extras: Mapping[str, Any] | None = None
    ) -> str:
        assert self._tokenizer is not None
        with bounded_time():
            text = str(
                self._tokenizer.apply_chat_template(
                    turns, add_generation_prompt=add_generation_prompt, tokenize=False, **(extras or {})
                )
            )
        return check_length(text, turns, extras)

    def _probe(self, turns: Sequence[Message], add_generation_prompt: bool, extras: Mapping[str, Any]) -> str | None:
        """What the template makes of turns of our own, None where it refuses them; ModelError where it has no end."""
        try:
            return self._apply(turns, add_generation_prompt, extras)
        except TemplateLimitError as error:
            raise ModelError(f"{self._model}: its chat template cannot be used: {error}.") from None
        except Exception:  # Whatever it is, it is said of the first row that meets it.
            return None

    def _answer(self, pair: Pair | Group, side: Text) -> tuple[Message, ...]:
        """A completion's turns as they are put into the template."""
        turns = as_turns(self._without_eos(side), "assistant")
        if not pair.divided_text:
            return turns
        # What stood between prompt and answer: now the template's header does.
        return ({**turns[0], "content": turns[0]["content"].lstrip()}, *turns[1:])

    def _without_eos(self, text: Text) -> Text:
        """A completion whose own text ends in EOS would get another from the template."""
        if not isinstance(text, str):
            content = self._without_eos(text[-1]["content"])
            return text if content == text[-1]["content"] else (*text[:-1], {**text[-1], "content": content})
        for eos in self._eos_texts:
            if text.rstrip().endswith(eos):
                return text.rstrip().removesuffix(eos)
        return text


def _spoken(turn: Message) -> Iterator[tuple[str, str]]:
    """The parts of what a turn says and thinks, each with the note for where it is left out."""
    thought, mark, words = turn["content"].rpartition("</think>")
    beside = [turn[name] for name in _THOUGHTS if isinstance(turn.get(name), str)]
    for note, part in (
        (WORDS_LEFT_OUT, words),
        (THOUGHT_LEFT_OUT, thought.rpartition("<think>")[2] if mark else ""),
        *((THOUGHT_LEFT_OUT, text) for text in beside),
    ):
        if part.strip():
            yield note, part.strip()


def _holds(text: str, part: str) -> bool:
    """Whether a part of a turn stands in a text, as it is or as JSON: templates write results of tools so."""
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _called(turn: Message) -> list[str]:
    """The names of the functions that a turn calls."""
    calls = [call.get("function", call) for call in turn.get("tool_calls") or []]
    return [call["name"] for call in calls if isinstance(call, dict) and isinstance(call.get("name"), str)]


def _between_marks(text: str, least: int, end: int) -> int:
    """`end`, or from `least` on the beginning of the mark or word that it is within: <think> and <tool> share <t."""
    for opening, closing in ("<>", "[]"):
        opened = text.rfind(opening, least, end)
        if opened >= 0 and closing not in text[opened:end]:
            end = opened
    while end > least and text[end - 1].isalnum() and text[end : end + 1].isalnum():
        end -= 1
    return end


def _common_length(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    if second.startswith(first):
        return len(first)
    return next((at for at, both in enumerate(zip(first, second, strict=False)) if both[0] != both[1]), len(second))


def _plain(text: Text, location: str) -> str:
    if not isinstance(text, str):
        raise DataError(
            f"{location}: the row is a conversation but the tokenizer has no chat template; give plain strings."
        )
    return text


def folded(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns whose system texts at their beginning stand at the head of the first turn after them."""
    count = sum(1 for _ in itertools.takewhile(lambda turn: turn.get("role") == "system", turns))
    if not 0 < count < len(turns):
        return turns
    content = "\n\n".join(turn["content"] for turn in turns[: count + 1])
    return [{**turns[count], "content": content}, *turns[count + 1 :]]
