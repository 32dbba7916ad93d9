"""One model's side of a chat: its history, and the keys and values that need not be computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache


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
        self._model, self._tokenizer, self._max_tokens, self._sampler = model, tokenizer, max_tokens, sampler
        self._state = state
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self._history: list[dict[str, str]] = []
        self._cache: list[Any] = []
        self._cached: list[int] = []

    def answer(self, prompt: str) -> Iterator[str]:
        """The answer to `prompt`, piece by piece; the turn is remembered once the last piece is taken."""
        asked = [*self._history, {"role": "user", "content": prompt}]
        ids = self._ids(asked)
        pieces: list[str] = []
        with self._state():
            left = self._reuse(ids)
            self._cached = list(ids)
            for response in stream_generate(
                self._model, self._tokenizer, left, max_tokens=self._max_tokens, sampler=self._sampler,
                prompt_cache=self._cache,
            ):  # fmt: skip
                self._cached.append(int(response.token))
                pieces.append(response.text)
                yield response.text
        self._history = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _ids(self, turns: list[dict[str, str]]) -> list[int]:
        if not self._tokenizer.has_chat_template:
            return list(self._tokenizer.encode(turns[-1]["content"]))
        return list(self._tokenizer.apply_chat_template(turns, add_generation_prompt=True))

    def _reuse(self, ids: list[int]) -> list[int]:
        """The part of `ids` that is not in the cache yet; the cache is cut back to the rest, or made anew."""
        common = 0
        # At least one token must be left to run.
        while common < min(len(ids) - 1, len(self._cached)) and ids[common] == self._cached[common]:
            common += 1
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
