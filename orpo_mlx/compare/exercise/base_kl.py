"""KL to the base model of replies to the same prompts, asked for again and again while a model is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import BatchKVCache

from orpo_mlx.models.adapters import adapters_off, in_evaluation

# Rows of a pass are of nearly one length, since they are taken by length: padding is run as well.
_ROWS = 16

Logps = npt.NDArray[np.float32]


class BaseKL:
    """KL(model ‖ base) of replies: Σ over a reply's positions and the whole vocabulary of π (log π - log π₀), nats.

    The base model is the model without its adapters. What it makes of the prompts is run once, now.

    Args:
        model: mlx-lm's, with the ordinary key-value cache in every layer.
        prompts: of any lengths, at least two tokens each.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._last = [prompt[-1] for prompt in prompts]
        longest = max(map(len, prompts)) - 1
        padding = [longest - len(prompt) + 1 for prompt in prompts]
        ids = mx.array([[0] * pad + list(prompt[:-1]) for pad, prompt in zip(padding, prompts, strict=True)])
        layers: Any = model.layers
        self._caches = [BatchKVCache(padding) for _ in layers]
        with in_evaluation(model), adapters_off(model):
            model(ids, cache=self._caches)
            mx.eval([cache.keys_and_values() for cache in self._caches])

    def __call__(self, replies: Sequence[Sequence[int]], logps: Sequence[mx.array]) -> list[float]:
        """The KL of each reply, of the model that drew it.

        Args:
            replies: one to each prompt, with the tokens that ended them; none of them empty.
            logps: of each its (T, V) log-probs under that model (`judging.generation.Drawn.logps`).
        """
        order = sorted(range(len(replies)), key=lambda row: len(replies[row]))
        found = [0.0] * len(replies)
        with in_evaluation(self._model), adapters_off(self._model):
            for start in range(0, len(order), _ROWS):
                rows = order[start : start + _ROWS]
                logits = self._logits(rows, [replies[row] for row in rows])
                for place, row in enumerate(rows):
                    base = np.array(logits[place, : len(replies[row])], np.float32)
                    found[row] = reply_kl(np.array(logps[row], np.float32), base)
        return found

    def _logits(self, rows: Sequence[int], replies: Sequence[Sequence[int]]) -> mx.array:
        caches = [copy.copy(cache) for cache in self._caches]
        for cache in caches:
            # Makes new arrays: those of all prompts stay as they are.
            cache.filter(mx.array(list(rows)))
        longest = max(map(len, replies))
        # Padding follows what counts, which it cannot change.
        read = [[self._last[row], *reply[:-1]] for row, reply in zip(rows, replies, strict=True)]
        logits: mx.array = self._model(mx.array([ids + [0] * (longest - len(ids)) for ids in read]), cache=caches)
        mx.eval(logits)
        return logits


def reply_kl(logps: Logps, logits: Logps) -> float:
    """Σ_t KL(p_t ‖ q_t), nats, of log p (T, V), up to a number for each t, and of logits of q (T, V)."""
    # By numpy, whose exp is some twenty times as fast on a CPU as MLX's. mlx-lm's log-probs are up to 1.4e-4 off in all
    # of a row: of twenty tokens that would be a KL of 0.003 where there is none.
    base = logits - logits.max(axis=-1, keepdims=True)
    base -= np.log(np.exp(base).sum(axis=-1, keepdims=True))
    chances = np.exp(logps)
    totals = chances.sum(axis=-1, keepdims=True)
    terms = chances * (logps - np.log(totals) - base)
    return float((terms.sum(axis=-1, dtype=np.float64) / totals[:, 0]).sum())
