"""Sample replies, to see with one's own eyes what training changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx_lm import stream_generate

from orpo_mlx.tokenization import PairTokenizer
from orpo_mlx.types import Pair, Text

MAX_TOKENS = 64


class Reply(NamedTuple):
    """A greedy answer to one prompt."""

    prompt: str
    text: str
    tokens: int


def pick_prompts(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """`count` pairs spread evenly over `pairs`."""
    count = min(count, len(pairs))
    return [pairs[(2 * number + 1) * len(pairs) // (2 * count)] for number in range(count)]


def sample_replies(model: nn.Module, tokenizer: Any, pairs: Sequence[Pair]) -> list[Reply]:
    """Greedy replies of at most `MAX_TOKENS` tokens to the prompts of `pairs`."""
    to_ids = PairTokenizer(tokenizer)
    was_training = model.training
    model.eval()
    replies = []
    for pair in pairs:
        ids = list(to_ids.prompt_ids(pair))
        parts = list(stream_generate(model, tokenizer, ids, max_tokens=MAX_TOKENS))
        text = "".join(part.text for part in parts)
        replies.append(Reply(_last_turn(pair.prompt), text.strip(), parts[-1].generation_tokens if parts else 0))
    model.train(was_training)
    return replies


def _last_turn(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
