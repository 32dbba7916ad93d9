"""A pair rendered as text: by the tokenizer's chat template, or as plain strings where it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.data.bounded_templates import TemplateLimitError, bound_templates, bounded_time, check_length
from orpo_mlx.data.messages import as_turns
from orpo_mlx.errors import DataError, ModelError, reason_of
from orpo_mlx.types import Group, Message, Pair, Text

# A text that no template writes by itself, to find in what one renders.
_MARK = "Zq1"
_QUESTION = {"role": "user", "content": "Hi"}


class RenderedTexts(NamedTuple):
    """A row's texts as the model reads them."""

    prompt: str
    """Up to where generation would start."""
    whole: tuple[str, ...]
    """Prompt and completion, of each completion."""


class PairRenderer:
    """Renders pairs for one tokenizer.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, or None for a model folder without one, for which nothing can be
            rendered.
        eos_texts: the texts of its EOS tokens.
    """

    def __init__(self, tokenizer: Any | None, eos_texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._eos_texts = eos_texts
        self._model = getattr(tokenizer, "name_or_path", None) or "the model"
        bound_templates()
        self.has_template = tokenizer is not None and tokenizer.has_chat_template
        self.folds_system = self.has_template and self._lacks_system_role()
        """Whether a system text goes to the head of the next turn, since the template has no system role."""
        self._stray = self._stray_header() if self.has_template else ""

    def texts(self, row: Pair | Group) -> RenderedTexts:
        """The texts of the prompt and of prompt + completion.

        Raises:
            DataError: no tokenizer, a conversation without a chat template, or a template that fails.
        """
        prompt = self.prompt(row)
        return RenderedTexts(prompt, tuple(self._whole(row, prompt, completion) for completion in row.completions))

    def prompt(self, pair: Pair | Group) -> str:
        """The text of a row's prompt alone.

        Raises:
            DataError: see `texts`.
        """
        if self._tokenizer is None:
            raise DataError(
                f"{pair.location}: the row is text but the model has no tokenizer; give prompt_ids, chosen_ids and "
                "rejected_ids."
            )
        if not self.has_template:
            return _plain(pair.prompt, pair.location)
        return self._render(pair, as_turns(pair.prompt, "user"), add_generation_prompt=True)

    def _whole(self, pair: Pair | Group, prompt: str, side: Text) -> str:
        side = self._without_eos(side)
        if not self.has_template:
            return prompt + _plain(side, pair.location)
        turns = (*as_turns(pair.prompt, "user"), *as_turns(side, "assistant"))
        return self._render(pair, turns, add_generation_prompt=False).removesuffix(self._stray)

    def _render(self, pair: Pair | Group, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        turns = [dict(message) for message in messages]
        extras = {"tools": [dict(tool) for tool in pair.tools] or None, **pair.template_kwargs}
        try:
            return self._apply(folded(turns) if self.folds_system else turns, add_generation_prompt, extras)
        except TemplateLimitError as error:
            # The model's fault and not the row's: to leave the row out would be to wait as long for the next one.
            raise ModelError(f"{self._model}: its chat template cannot be used on {pair.location}: {error}.") from None
        except Exception as error:  # Templates raise whatever they like, jinja2's errors among others.
            roles = ", ".join(str(turn.get("role")) for turn in turns)
            reason = reason_of(error, first_line=True)
            raise DataError(f"{pair.location}: the chat template refused the turns ({roles}): {reason}.") from error

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

    def _without_eos(self, text: Text) -> Text:
        """A completion whose own text ends in EOS would get another from the template."""
        if not isinstance(text, str):
            content = self._without_eos(text[-1]["content"])
            return text if content == text[-1]["content"] else (*text[:-1], {**text[-1], "content": content})
        for eos in self._eos_texts:
            if text.rstrip().endswith(eos):
                return text.rstrip().removesuffix(eos)
        return text

    def _probe(self, turns: Sequence[Message], add_generation_prompt: bool) -> str | None:
        """What the template makes of turns of our own, None where it refuses them; ModelError where it has no end."""
        try:
            return self._apply(turns, add_generation_prompt)
        except TemplateLimitError as error:
            raise ModelError(f"{self._model}: its chat template cannot be used: {error}.") from None
        except Exception:  # Templates raise whatever they like.
            return None

    def _lacks_system_role(self) -> bool:
        """Whether the template refuses a system turn, or leaves it out in silence."""
        if self._probe([_QUESTION], True) is None:  # A template that takes nothing is named with the first row.
            return False
        text = self._probe([{"role": "system", "content": _MARK}, _QUESTION], True)
        return text is None or _MARK not in text

    def _stray_header(self) -> str:
        """What the template writes after a finished answer beyond its EOS: the next turn's header, asked for or not."""
        text = self._probe([_QUESTION, {"role": "assistant", "content": _MARK}], False)
        if text is None:  # As above.
            return ""
        after = text.rpartition(_MARK)[2]
        _, eos, rest = min(
            (after.partition(text) for text in self._eos_texts), key=lambda cut: len(cut[0]), default=("",) * 3
        )
        # White space after EOS stays: many templates end every turn in a line break, also the last.
        blank = len(rest) - len(rest.lstrip())
        return rest[blank:] if eos else ""


def _plain(text: Text, location: str) -> str:
    if not isinstance(text, str):
        raise DataError(
            f"{location}: the row is a conversation but the tokenizer has no chat template; give plain strings."
        )
    return text


def folded(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns whose system text stands at the head of the first turn after it."""
    if len(turns) < 2 or turns[0].get("role") != "system":
        return turns
    first = {**turns[1], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return [first, *turns[2:]]
