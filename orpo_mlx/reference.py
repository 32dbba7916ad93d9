"""Log-probs under the reference model, remembered per pair. Never a second copy of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import numpy as np

from orpo_mlx.batching import collate
from orpo_mlx.logprobs import PairScorer, pair_logps
from orpo_mlx.lora import adapters_off
from orpo_mlx.types import Batch, PairLogProbs, TokenizedPair


def pair_key(pair: TokenizedPair) -> bytes:
    """A digest of a pair's token ids."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.array(ids, np.int32).tobytes())
    return digest.digest()


class ReferenceLogProbs:
    """Summed log-probs of both completions under the model as it was before training.

    With `adapters_are_new` (fresh LoRA or DoRA), the reference is the model with its adapters off, computed when a
    pair is first met. Otherwise (full fine-tuning, or training on from an adapter) the weights that define it are
    about to change, so `remember` must be called for every pair before the first step.

    Args:
        scorer: the policy.
        adapters_are_new: whether "adapters off" is the model as it was before training.
        with_prompt: whether the policy's prompt tokens go through the head as well (`nll="sequence"`). The reference's
            then do too, so that policy and reference are the same sums, bit for bit, where they are the same model:
            dpop's gradient jumps there.
    """

    def __init__(self, scorer: PairScorer, *, adapters_are_new: bool, with_prompt: bool = False) -> None:
        self._scorer = scorer
        self._live = adapters_are_new
        self._nll_tokens_per_pair = 1.0 if with_prompt else None
        self._known: dict[bytes, tuple[float, float]] = {}

    @property
    def needs_precomputing(self) -> bool:
        """Whether every pair must be remembered before the first step."""
        return not self._live

    def __call__(self, pairs: Sequence[TokenizedPair], batch: Batch) -> tuple[mx.array, mx.array]:
        """Reference log-probs (nats, float32, shape (B,) each) of the chosen and rejected sides of `batch`.

        Raises:
            KeyError: a pair that was not remembered, where the reference can no longer be computed.
        """
        keys = [pair_key(pair) for pair in pairs]
        if any(key not in self._known for key in keys):
            if not self._live:
                raise KeyError("a pair has no reference log-probs and the weights that define them have changed.")
            self._compute(keys, batch, adapters_off(self._scorer.model))
        chosen, rejected = zip(*(self._known[key] for key in keys), strict=True)
        return mx.array(chosen, mx.float32), mx.array(rejected, mx.float32)

    def adopt(self, pairs: Sequence[TokenizedPair], logps: PairLogProbs) -> None:
        """Keep log-probs of the policy as the reference's: they are the same numbers until the first optimiser step."""
        self._keep([pair_key(pair) for pair in pairs], logps)

    def remember(self, groups: Iterable[Sequence[TokenizedPair]]) -> None:
        """Compute and keep the reference log-probs of all pairs, group by group, with the weights as they are now.

        Groups in the composition training will use give the very same floating-point sums as training's first step.
        """
        was_training = self._scorer.model.training
        self._scorer.model.eval()
        for group in groups:
            off = adapters_off(self._scorer.model) if self._live else nullcontext()
            self._compute([pair_key(pair) for pair in group], collate(group), off)
        self._scorer.model.train(was_training)

    def _compute(self, keys: Sequence[bytes], batch: Batch, context: AbstractContextManager[None]) -> None:
        with context:
            tokens = self._nll_tokens_per_pair
            self._keep(keys, pair_logps(self._scorer, batch, nll_tokens_per_pair=tokens, gradient=False))

    def _keep(self, keys: Sequence[bytes], logps: PairLogProbs) -> None:
        chosen, rejected = np.array(logps.chosen), np.array(logps.rejected)
        for key, first, second in zip(keys, chosen.tolist(), rejected.tolist(), strict=True):
            self._known[key] = (first, second)


def with_reference(logps: PairLogProbs, reference: tuple[mx.array, mx.array] | None) -> PairLogProbs:
    """`logps` with the reference's log-probs beside them."""
    if reference is None:
        return logps
    return logps._replace(reference_chosen=reference[0], reference_rejected=reference[1])
