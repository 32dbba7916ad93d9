"""A reference that is a second copy of the weights, run at every step: what other trainers do, to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.models.adapters import adapters_off
from orpo_mlx.training.reference import ReferenceLogProbs
from orpo_mlx.types import Batch, PairLogProbs, TokenizedPair


def copy_of(model: nn.Module, *, base: bool) -> nn.Module:
    """A model with buffers of its own, frozen and in evaluation mode.

    Args:
        model: the policy before its first step.
        base: whether to leave its adapters out: fresh ones change nothing.
    """
    if base:
        with adapters_off(model):
            twin = copy.deepcopy(model)
    else:
        twin = copy.deepcopy(model)
    # A deep copy of an array shares its buffer until one of the two is computed anew.
    twin.update(tree_map(lambda array: array + mx.zeros((), array.dtype), twin.parameters()))
    mx.eval(twin.parameters())
    twin.freeze()
    twin.eval()
    return twin


class CopiedReference(ReferenceLogProbs):
    """Log-probs under a copy of the model, computed whenever they are asked for and never remembered.

    Args:
        scorer: of the copy.
        with_prompt: as in `ReferenceLogProbs`.
    """

    def __init__(self, scorer: PairScorer, *, with_prompt: bool = False) -> None:
        super().__init__(scorer, adapters_are_new=True, with_prompt=with_prompt)
        # `scorer` follows the policy's when a run changes how it spends memory; the copy stays what it is.
        self._twin = scorer

    def keep_in(self, folder: Path, model_config: Mapping[str, Any]) -> None:
        """Nothing is kept."""

    def adopt(self, pairs: Sequence[TokenizedPair], logps: PairLogProbs) -> None:
        """Nothing is kept."""

    def __call__(self, pairs: Sequence[TokenizedPair], batch: Batch) -> tuple[mx.array, mx.array]:
        """Log-probs (nats, float32, shape (B,) each) of both sides under the copy."""
        tokens = self._nll_tokens_per_pair
        logps = pair_logps(self._twin, batch, nll_tokens_per_pair=tokens, gradient=False)
        mx.eval(logps.chosen, logps.rejected)
        return logps.chosen, logps.rejected

    def remember(
        self, groups: Iterable[Sequence[TokenizedPair]], progress: Callable[[int], None] = lambda done: None
    ) -> None:
        """Nothing is kept: each step computes its own."""
