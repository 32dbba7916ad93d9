"""How far a trained model has moved from its base, and how varied what it says is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from orpo_mlx.engine.head_logps import kl_divergence, log_softmax
from orpo_mlx.judging.generation import Generator, StopTokens
from orpo_mlx.judging.requests import Sampling
from orpo_mlx.models.adapters import adapters_off, in_evaluation


class Divergence(NamedTuple):
    """KL(policy ‖ base) in nats, on replies the policy gave."""

    per_reply: float
    per_token: float
    replies: int
    tokens: int


def sampled_kl(
    model: nn.Module, prompts: Sequence[Sequence[int]], stop: Collection[int], *, seed: int, max_tokens: int
) -> Divergence:
    """KL of a model with adapters to itself without them, over replies to held-out prompts.

    The estimator: for each prompt one reply y is sampled from the policy at temperature 1 (until a stop token, or
    `max_tokens`); at each of its positions the KL between the two next-token distributions is summed over the whole
    vocabulary. E_y Σ_t KL(π(·|x, y<t) ‖ π₀(·|x, y<t)) is the KL between the distributions of replies of at most
    `max_tokens` tokens, by the chain rule; so the mean over prompts is an unbiased estimate of it. `per_token` is Σ KL
    over Σ tokens.
    """
    # Whole distributions rather than the usual mean of log π(y) - log π₀(y): never negative, and of smaller variance.
    # Every method is asked with the same draws.
    generator = Generator(model, StopTokens(stop), Sampling(max_tokens, 1.0, seed=seed), rows=len(prompts))
    total = 0.0
    tokens = 0
    for prompt, drawn in zip(prompts, generator.draw(prompts, 0), strict=True):
        # The stop token is kept: when to stop is part of the distribution over replies.
        reply = drawn.ids if drawn.end is None else [*drawn.ids, drawn.end]
        with in_evaluation(model):
            total += float(sequence_kl(model, prompt, reply))
        tokens += len(reply)
    return Divergence(total / len(prompts), total / tokens, len(prompts), tokens)


def sequence_kl(model: nn.Module, prompt: Sequence[int], reply: Sequence[int]) -> mx.array:
    """Σ over the reply's positions of KL(with adapters ‖ without), nats."""
    ids = mx.array([[*prompt, *reply]])
    # The distribution that a token was drawn from stands at the position before it.
    places = slice(len(prompt) - 1, len(prompt) + len(reply) - 1)
    with adapters_off(model):
        base = model(ids)
    mx.eval(base)
    return kl_divergence(log_softmax(model(ids)[0, places]), log_softmax(base[0, places])).sum()


def distinct_n(texts: Sequence[str], n: int = 2) -> float | None:
    """Different word n-grams over all word n-grams of all texts (Li et al. 2016); None where there are none."""
    grams = []
    for words in (text.split() for text in texts):
        grams += [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
