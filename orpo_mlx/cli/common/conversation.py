"""Conversations with one model or two side by side, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.errors import ConfigError, ModelError
from orpo_mlx.models.adapters import adapters_off, add_trained_adapters, has_switchable_adapters
from orpo_mlx.models.loading import find, load
from orpo_mlx.models.names import DEFAULT_MODEL
from orpo_mlx.models.recorded import base_model
from orpo_mlx.models.vocabulary import check_ids, vocabulary_of
from orpo_mlx.text import printable_lines
from orpo_mlx.types import Pair


class Conversation:
    """Questions and answers with one model.

    Args:
        model: in evaluation mode.
        tokenizer: mlx-lm's; without a chat template each prompt stands alone, as raw text.
        max_tokens: of one answer.
        sampler: log-probs (1, V) to token ids (1,).
        state: a context in which every answer is given, such as the one with the adapters off.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_tokens: int,
        sampler: Callable[[mx.array], mx.array],
        state: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._to_ids = PairTokenizer(tokenizer)
        self._max_tokens = max_tokens
        self._sampler = sampler
        self._state = state
        self._vocabulary = vocabulary_of(model)
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self._history: list[dict[str, str]] = []
        self._cache: list[Any] = []
        # Ids whose keys and values are in the cache, or are about to be.
        self._cached: list[int] = []

    def answer(self, prompt: str) -> Iterator[str]:
        """The answer to `prompt`, piece by piece; the turn is remembered once the last piece is taken."""
        asked = [*self._history, {"role": "user", "content": prompt}]
        ids = prompt_ids(self._to_ids, asked)
        # A tokenizer may know tokens that the model has no rows for, and MLX would read beyond them.
        check_ids(self._vocabulary, ids, "the prompt")
        pieces: list[str] = []
        with self._state():
            left = self._reuse(ids)
            self._cached = list(ids)
            for response in stream_generate(
                self._model,
                self._tokenizer,
                left,
                max_tokens=self._max_tokens,
                sampler=self._sampler,
                prompt_cache=self._cache,
            ):
                self._cached.append(int(response.token))
                pieces.append(response.text)
                yield response.text
        self._history = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _reuse(self, ids: list[int]) -> list[int]:
        """The part of `ids` that is not in the cache yet; the cache is cut back to the rest, or made anew."""
        common = 0
        # At least one token must be left to run.
        while common < min(len(ids) - 1, len(self._cached)) and ids[common] == self._cached[common]:
            common += 1
        # A cache that does not say how many tokens it holds cannot be cut back by a number of them.
        held = getattr(self._cache[0], "offset", None) if self._cache else None
        if isinstance(held, int) and can_trim_prompt_cache(self._cache):
            # Of the last token no keys and values may be there yet; of one after it, they may.
            common = min(common, held)
            # mlx-lm annotates this as a list; it is the number of tokens cut off.
            cut: Any = trim_prompt_cache(self._cache, held - common)
            if cut == held - common:
                return ids[common:]
        self._cache = make_prompt_cache(self._model)
        return ids


def prompt_ids(to_ids: PairTokenizer, turns: list[dict[str, str]]) -> list[int]:
    """Token ids of what the model is asked, as in training; UserError where the chat template refuses it."""
    prompt = tuple(turns) if to_ids.has_template else turns[-1]["content"]
    return list(to_ids.prompt_ids(Pair(prompt, "", "", "the conversation")))


_WIDE = 100
"""Columns from which two answers stand side by side."""
_TAB = "    "


class Chat:
    """Conversations that are asked the same, and where their answers are shown.

    Args:
        sides: by name; a single one is shown without it.
        console: side by side where it is a wide terminal, one under another where it is not.
    """

    def __init__(self, sides: dict[str, Conversation], console: Console) -> None:
        self._sides = sides
        self._console = console

    def ask(self, prompt: str) -> None:
        """Put `prompt` to every side and show the answers."""
        if len(self._sides) > 1 and self._console.is_terminal and self._console.width >= _WIDE:
            self._in_columns(prompt)
            return
        for name, side in self._sides.items():
            if len(self._sides) > 1:
                self._console.print(Text(f"[{name}]"))
            for piece in side.answer(prompt):
                self._console.print(shown(piece), end="", soft_wrap=True)
            self._console.print()

    def reset(self) -> None:
        """Let every side forget what was said."""
        for side in self._sides.values():
            side.reset()

    def _in_columns(self, prompt: str) -> None:
        table = Table(expand=True, show_lines=False)
        answers = []
        for name, side in self._sides.items():
            table.add_column(name, ratio=1, overflow="fold")
            with self._console.status(f"{name} answers"):
                answers.append(shown("".join(side.answer(prompt))))
        table.add_row(*answers)
        self._console.print(table)


def shown(text: str) -> Text:
    """A model's text as it is shown: nothing in it is obeyed by the terminal."""
    return Text(printable_lines(text.replace("\t", _TAB)))


def talk(chat: Chat, lines: Iterable[str]) -> None:
    """Answer line after line until they end or one says /quit; /reset forgets, blank lines are skipped."""
    for line in map(str.strip, lines):
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
        elif line:
            chat.ask(line)


def open_chat(
    folder: Path | None,
    console: Console,
    *,
    model: str | None,
    compare: bool,
    max_tokens: int,
    temperature: float,
    dtype: str | None,
    trust_remote_code: bool,
) -> Chat:
    """The tuned model of an adapter folder, or a model as it is, ready to be asked.

    Args:
        folder: of adapters; None for the model alone.
        console: where answers go; notes go to stderr.
        model: None for the one that the adapters were made for.
        compare: whether the base model answers as well.
        max_tokens: of one answer.
        temperature: 0 is greedy.
        dtype: a key of `DTYPES`; None for the checkpoint's.
        trust_remote_code: whether Python code that comes with the checkpoint may run.

    Raises:
        UserError: model or adapters cannot be used.
    """
    if folder is None and compare:
        raise ConfigError("`compare`: there are no adapters to compare with; give `adapter_path`, or leave it out.")
    named = (base_model(folder) if folder else DEFAULT_MODEL) if model is None else model
    source = f"{folder / 'adapter_config.json'}: model" if folder and model is None else "`model`"
    info = find(named, trust_remote_code=trust_remote_code, source=source)
    loaded = load(info, dtype=dtype, trust_remote_code=trust_remote_code)
    if loaded.tokenizer is None:
        raise ModelError(f"{loaded.path}: has no tokenizer, so nobody can talk with it; give a model that has one.")
    if folder is not None:
        add_trained_adapters(loaded.model, folder)
    if compare and not has_switchable_adapters(loaded.model):
        raise ConfigError(
            f"`compare`: {folder} holds whole weights, which cannot be switched off; leave `compare` out, and ask the "
            "base model with mlx_lm generate."
        )
    notes = [f"{named}, with the adapters in {folder}." if folder else f"{named}, without adapters."]
    notes += [loaded.note] if loaded.note else []
    if not loaded.tokenizer.has_chat_template:
        notes.append("This model has no chat template: each prompt stands alone, as raw text.")
    for note in notes:
        Console(stderr=True).print(shown(note), soft_wrap=True)
    side = partial(
        Conversation, loaded.model, loaded.tokenizer, max_tokens=max_tokens, sampler=make_sampler(temperature)
    )
    sides = {"base": side(state=partial(adapters_off, loaded.model))} if compare else {}
    return Chat({**sides, "tuned" if folder else "base": side()}, console)
