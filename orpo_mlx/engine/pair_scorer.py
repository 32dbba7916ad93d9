"""Log-probabilities of completions: the only next-token shift and mask in the package.

Kept here and nowhere else: the state at position t predicts token t+1, so the first completion token is predicted from
the last prompt position; and only positions somebody asked for reach the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from orpo_mlx.engine.attention import KEPT_BYTES
from orpo_mlx.engine.equivalence import PROBE_ERRORS, probe_batch, same_states, without_dropout
from orpo_mlx.engine.lm_head import find_head, head_logps, token_logps, trained_head_logps
from orpo_mlx.engine.patched_layers import lean_agrees, lean_layers
from orpo_mlx.engine.shared_prompt import PrefixCaches
from orpo_mlx.types import Batch, PairLogProbs, States

Caches = list[Any] | None
Run = Callable[[mx.array, Caches], mx.array]
"""Token ids (R, L) and a cache for each layer to states (R, L, ·)."""


class TokenLogProbs(NamedTuple):
    """log p(token | what precedes it) in nats, float32, 0 where there is padding or nothing was asked for."""

    prompt: mx.array | None
    """(B, P), or None where prompts were not asked for; a prompt's first token has no prediction and is 0."""
    chosen: mx.array
    """(B, C)."""
    rejected: mx.array
    """(B, R)."""


class PairScorer:
    """Per-token log-probs of pairs under a causal mlx-lm model.

    What the model allows is found out once, by proof on a few tokens: whether backbone and head can be told apart, so
    that only wanted positions reach the head (`head`), whether its layers may call this package's functions
    (`lean`), and whether the prompt can be run once for both completions (`shares_prompt`). What cannot be proven falls
    back to the model's plain forward.

    Args:
        model: an mlx-lm causal language model, `model(ids (R, L)) -> logits (R, L, V)`.
        share_prompt: False runs the prompt once per completion.
        split_head: False computes the logits of every position.
        lean: False runs the model's layers exactly as mlx-lm wrote them.
        kept_attention_bytes: see `attention`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        share_prompt: bool = True,
        split_head: bool = True,
        lean: bool = True,
        kept_attention_bytes: int = KEPT_BYTES,
    ) -> None:
        self.model, self._kept_attention_bytes = model, kept_attention_bytes
        self.lean = self.shares_prompt = self._padded_prefix = False
        with without_dropout(model):
            self.head = find_head(model) if split_head else None
            self.lean = lean and self._lean_agrees()
            if share_prompt:
                self._prefix_caches = PrefixCaches(model)
                self.shares_prompt = self._prefix_caches.fit and self._proves("shares_prompt", padded=False)
                # Against the rows one at a time.
                self._padded_prefix = self.shares_prompt and self._proves("_padded_prefix", padded=True)

    @property
    def splits_head(self) -> bool:
        """Whether only wanted positions reach the head."""
        return self.head is not None

    @property
    def backbone(self) -> Any:
        """What maps ids to states: the whole model where its head could not be told apart."""
        return self.model if self.head is None else self.head.backbone

    def __call__(
        self, batch: Batch, *, with_prompt: bool = False, gradient: bool = True, states: States | None = None
    ) -> TokenLogProbs:
        """Per-token log-probs of a batch.

        Args:
            batch: B pairs.
            with_prompt: also those of the prompt's tokens.
            gradient: False where no gradient will be taken.
            states: what `states(batch)` gave, where that is at hand.
        """
        prompt, chosen, rejected = self.states(batch) if states is None else states
        parts = [
            (mx.concatenate([prompt[:, -1:], chosen[:, :-1]], axis=1), batch.chosen_ids, batch.chosen_mask),
            (mx.concatenate([prompt[:, -1:], rejected[:, :-1]], axis=1), batch.rejected_ids, batch.rejected_mask),
        ]
        if not with_prompt:
            chosen_logps, rejected_logps = self._predict(parts, gradient)
            return TokenLogProbs(None, chosen_logps, rejected_logps)
        first = mx.zeros(batch.prompt_ids[:, :1].shape)
        if batch.prompt_ids.shape[1] == 1:
            return TokenLogProbs(first, *self._predict(parts, gradient))
        predicted = batch.prompt_mask[:, 1:] & batch.prompt_mask[:, :-1]
        parts.append((prompt[:, :-1], batch.prompt_ids[:, 1:], predicted))
        chosen_logps, rejected_logps, prompt_logps = self._predict(parts, gradient)
        return TokenLogProbs(mx.concatenate([first, prompt_logps], axis=1), chosen_logps, rejected_logps)

    def _predict(self, parts: list[tuple[mx.array, mx.array, mx.array]], gradient: bool) -> list[mx.array]:
        """Log-probs of the masked targets from the states before them, all parts through the head together."""
        picks: list[mx.array | None] = []
        states, targets = [], []
        for hidden, ids, mask in parts:
            rows, tokens = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1)
            wanted = np.flatnonzero(np.array(mask))
            # Without padding there is nothing to pick, and no gradient to scatter.
            flat = None if wanted.size == ids.size else mx.array(wanted.astype(np.int32))
            picks.append(flat)
            states.append(rows if flat is None else mx.take(rows, flat, axis=0))
            targets.append(tokens if flat is None else mx.take(tokens, flat))
        logps = self._head_logps(mx.concatenate(states), mx.concatenate(targets), gradient)
        grids = []
        start = 0
        for pick, (_, ids, _) in zip(picks, parts, strict=True):
            found = logps[start : start + (ids.size if pick is None else pick.size)]
            start += found.size
            grid = found if pick is None else mx.zeros(ids.size, mx.float32).at[pick].add(found)
            grids.append(grid.reshape(ids.shape))
        return grids

    def _head_logps(self, states: mx.array, targets: mx.array, gradient: bool) -> mx.array:
        if self.head is None:
            return token_logps(states, targets)
        if gradient and not self.head.is_frozen:
            return trained_head_logps(self.head, states, targets)
        return head_logps(self.head, states, targets, gradient=gradient)

    def states(self, batch: Batch) -> States:
        """What the head is given; the logits themselves where the head could not be told apart."""
        with self.layers():
            outputs = self.streams(batch, lambda ids, caches: self.backbone(ids, cache=caches))
        return self.assemble(batch, outputs)

    def layers(self) -> AbstractContextManager[None]:
        """The context in which the model's layers are to be called."""
        return lean_layers(self.model, self._kept_attention_bytes) if self.lean else nullcontext()

    def streams(self, batch: Batch, run: Run) -> tuple[mx.array, ...]:
        """`run` on each token sequence of a batch, in a fixed order: prompts before the completions that need them."""
        if not self.shares_prompt:
            return tuple(run(rows, None) for rows in _plain_rows(batch))
        outputs = []
        for part in self._parts(batch):
            prefix = self._prefix_caches(part.left_padding, part.prompt_ids.shape[1])
            outputs.append(run(part.prompt_ids, prefix))
            outputs += [run(ids, [layer.branch() for layer in prefix]) for ids in (part.chosen_ids, part.rejected_ids)]
        return tuple(outputs)

    def assemble(self, batch: Batch, outputs: Sequence[mx.array]) -> States:
        """States of a batch from what its streams gave."""
        width = batch.prompt_ids.shape[1]
        if not self.shares_prompt:
            chosen, rejected = (_from_left(rows, batch) for rows in outputs)
            return chosen[:, :width], chosen[:, width:], rejected[:, width:]
        prompts = [mx.pad(rows, [(0, 0), (width - rows.shape[1], 0), (0, 0)]) for rows in outputs[::3]]
        return mx.concatenate(prompts), mx.concatenate(list(outputs[1::3])), mx.concatenate(list(outputs[2::3]))

    def _parts(self, batch: Batch) -> list[Batch]:
        # Where the model's attention takes no mask per row, pairs one at a time have no padding between them.
        return [batch] if batch.left_padding is None or self._padded_prefix else _rows(batch)

    def _lean_agrees(self) -> bool:
        try:
            return lean_agrees(self.model, lambda: self.states(probe_batch(padded=False)), self._kept_attention_bytes)
        except PROBE_ERRORS:
            return False

    def _proves(self, switch: str, *, padded: bool) -> bool:
        """Whether the states of a few tokens are the same with `switch` on as with it off."""
        batch = probe_batch(padded=padded)
        plain = self.states(batch)
        setattr(self, switch, True)
        try:
            return same_states(self.states(batch), plain, batch)
        except PROBE_ERRORS:
            return False
        finally:
            setattr(self, switch, False)


def pair_logps(
    scorer: PairScorer,
    batch: Batch,
    *,
    nll_tokens_per_pair: float | None = None,
    gradient: bool = True,
    states: States | None = None,
) -> PairLogProbs:
    """Summed log-probabilities of both completions of each pair, and the NLL of the chosen side.

    Args:
        scorer: the policy.
        batch: B pairs.
        nll_tokens_per_pair: None for `nll="completion"`, the mean over a pair's chosen completion tokens
            (Hong et al. 2024, eq. 2). For `nll="sequence"`, the predicted tokens of prompt + chosen per pair, averaged
            over the whole window this batch is part of: the mean of `nll` over the window's pairs is then the token
            mean over prompt and chosen completion together, however the window is cut into batches.
        gradient: False where no gradient will be taken.
        states: what `scorer.states(batch)` gave, where that is at hand.
    """
    tokens = scorer(batch, with_prompt=nll_tokens_per_pair is not None, gradient=gradient, states=states)
    chosen, rejected = tokens.chosen.sum(axis=1), tokens.rejected.sum(axis=1)
    chosen_tokens = batch.chosen_mask.sum(axis=1).astype(mx.float32)
    rejected_tokens = batch.rejected_mask.sum(axis=1).astype(mx.float32)
    if nll_tokens_per_pair is None or tokens.prompt is None:
        nll = -chosen / chosen_tokens
    else:
        nll = -(tokens.prompt.sum(axis=1) + chosen) / nll_tokens_per_pair
    return PairLogProbs(chosen, rejected, chosen_tokens, rejected_tokens, nll)


def join_logps(parts: Sequence[PairLogProbs]) -> PairLogProbs:
    """Log-probs of several batches as those of one."""
    columns: list[Any] = [
        None if column[0] is None else mx.concatenate(list(column)) for column in zip(*parts, strict=True)
    ]
    return PairLogProbs(*columns)


def _rows(batch: Batch) -> list[Batch]:
    """Each pair as a batch of one without padding before its prompt."""
    assert batch.left_padding is not None
    rows = []
    for row, padding in enumerate(np.array(batch.left_padding).tolist()):
        one = Batch(*(field[row : row + 1] for field in batch if field is not None))
        prompt_ids, prompt_mask = one.prompt_ids[:, padding:], one.prompt_mask[:, padding:]
        rows.append(one._replace(prompt_ids=prompt_ids, prompt_mask=prompt_mask, left_padding=None))
    return rows


def _plain_rows(batch: Batch) -> list[mx.array]:
    """Prompt + completion for each side, every row brought to the left: its padding turns up at the end."""
    return [
        _to_left(mx.concatenate([batch.prompt_ids, ids], axis=1), batch)
        for ids in (batch.chosen_ids, batch.rejected_ids)
    ]


def _to_left(rows: mx.array, batch: Batch) -> mx.array:
    if batch.left_padding is None:
        return rows
    return mx.take_along_axis(
        rows, (mx.arange(rows.shape[1])[None] + batch.left_padding[:, None]) % rows.shape[1], axis=1
    )


def _from_left(states: mx.array, batch: Batch) -> mx.array:
    if batch.left_padding is None:
        return states
    column = (mx.arange(states.shape[1])[None] - batch.left_padding[:, None]) % states.shape[1]
    return mx.take_along_axis(states, column[..., None], axis=1)
