"""Sample replies, to see with one's own eyes what training changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm import stream_generate

from orpo_mlx.data.prompts import evenly_spread
from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.reporting.resumable_jsonl import LineFile
from orpo_mlx.types import Group, Pair, Reply, Text


def pick_prompts(pairs: Sequence[Pair | Group], count: int) -> list[Pair | Group]:
    """`count` pairs spread evenly over `pairs`."""
    return [pairs[index] for index in evenly_spread(len(pairs), count)]


def sample_replies(
    model: nn.Module, tokenizer: Any, pairs: Sequence[Pair | Group], max_tokens: int, *, template_strings: bool = True
) -> list[Reply]:
    """Greedy replies of at most `max_tokens` tokens to the prompts of `pairs`; see `PairTokenizer`."""
    to_ids = PairTokenizer(tokenizer, template_strings=template_strings)
    # Dropout would draw random numbers and change what is said.
    was_training = model.training
    model.eval()
    replies = []
    try:
        for pair in pairs:
            ids = list(to_ids.prompt_ids(pair))
            parts = list(stream_generate(model, tokenizer, ids, max_tokens=max_tokens))
            text = "".join(part.text for part in parts)
            replies.append(Reply(_last_turn(pair.prompt), text.strip(), parts[-1].generation_tokens if parts else 0))
    finally:
        model.train(was_training)
    return replies


class Sampler:
    """The sample prompts of a run, answered when asked for.

    Args:
        model: in any mode, which it keeps.
        tokenizer: mlx-lm's.
        prompts: pairs whose prompts are answered; none where nothing is to be sampled.
        max_tokens: of one reply.
        file: receives an object for each reply, with `step`, `prompt`, `text` and `tokens`; None: nothing is kept.
        template_strings: see `PairTokenizer`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Pair | Group],
        max_tokens: int,
        file: LineFile | None = None,
        *,
        template_strings: bool = True,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._template_strings = template_strings
        self.prompts = prompts
        self.file = file

    def __call__(self, step: int) -> list[Reply]:
        """The replies after `step` optimiser steps."""
        replies: list[Reply] = []
        if self.prompts:
            replies = sample_replies(
                self._model,
                self._tokenizer,
                self.prompts,
                self._max_tokens,
                template_strings=self._template_strings,
            )
        if self.file is not None:
            self.file.append([{"step": step, **reply._asdict()} for reply in replies])
        return replies


def _last_turn(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
