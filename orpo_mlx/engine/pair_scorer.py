"""Log-probabilities of completions: the only place where the model's states meet the tokens they predict.

The state at position t predicts token t+1, so a completion's first token is predicted from the last prompt position;
and only positions somebody asked for reach the head. Which they are is laid out by `data.batching.collate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from orpo_mlx.data.batching import collate
from orpo_mlx.device_profile import DeviceProfile, device_profile
from orpo_mlx.engine.equivalence import probe_pairs, same_states, without_dropout
from orpo_mlx.engine.functions.patched_layers import patched_layers
from orpo_mlx.engine.functions.proofs import HEAD, Proofs, prove_functions
from orpo_mlx.engine.head_logps import (
    add_collisions,
    head_log_collisions,
    head_logps,
    token_logps,
    trained_head_logps,
)
from orpo_mlx.engine.lm_head import find_head
from orpo_mlx.engine.router_loss import Routers
from orpo_mlx.engine.shared_prompt import PrefixCaches
from orpo_mlx.types import SUMS_ALONE, Batch, Example, GroupLogProbs, LogProbs, PairLogProbs, Wanted

Caches = list[Any] | None
AnyLogProbs = TypeVar("AnyLogProbs", bound=LogProbs)
Forward = Callable[[mx.array, Caches], mx.array]
"""Token ids (R, L) and a cache for each layer to states (R, L, ·)."""


class PairScorer:
    """Per-token log-probs of pairs under a causal mlx-lm model.

    Each fast path is enabled only if it matches the plain forward on a probe of a few tokens, once, here: backbone and
    head apart, so that only wanted positions reach the head (`head`); this package's functions in the model's layers
    (`proofs`); and the prompt run once for both completions (`shares_prompt`). What does not match is left out, and
    `notes` says so.

    Args:
        model: an mlx-lm causal language model, `model(ids (R, L)) -> logits (R, L, V)`.
        share_prompt: False runs the prompt once per completion.
        split_head: False computes the logits of every position.
        lean: False runs the model's layers exactly as mlx-lm wrote them.
        kept_attention_bytes: see `attention`.
        profile: what the device wants; by default that of MLX's default device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        share_prompt: bool = True,
        split_head: bool = True,
        lean: bool = True,
        kept_attention_bytes: int = 8 << 20,
        profile: DeviceProfile | None = None,
    ) -> None:
        self.model, self.profile, self._kept_attention_bytes = model, profile or device_profile(), kept_attention_bytes
        # The proofs below, that of sharing last of all, are made against prompts that are run once per completion.
        self.layout = self.profile.layout._replace(share_prompt=False)
        self.proofs = Proofs(frozenset(), ())
        self.routers: Routers | None = None
        """Given where a loss looks at what routers of experts said."""
        with without_dropout(model):
            self.head = find_head(model) if split_head else None
            if lean:
                self.proofs = prove_functions(model, self._probe_states, self.profile, kept_attention_bytes, self.head)
            if self.head is not None and lean and HEAD not in self.proofs.enabled:
                self.head.tiles = False
            if share_prompt and self.profile.layout.share_prompt:
                self._prefix_caches = PrefixCaches(model)
                shared = self._prefix_caches.fit and self._matches_plain_rows()
                self.layout = self.layout._replace(share_prompt=shared)

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence about each of this package's functions that the model has to do without."""
        return self.proofs.notes

    @property
    def shares_prompt(self) -> bool:
        """Whether what completions share of their prompt is run once."""
        return self.layout.share_prompt

    @property
    def splits_head(self) -> bool:
        """Whether only wanted positions reach the head."""
        return self.head is not None

    @property
    def backbone(self) -> Any:
        """What maps ids to states: the whole model where its head could not be told apart."""
        return self.model if self.head is None else self.head.backbone

    def collate(self, pairs: Sequence[Example], *, with_prompt: bool = False, whole_groups: bool = False) -> Batch:
        """The pairs or groups in the layout that model and device take; see `data.batching.collate`."""
        return collate(pairs, self.layout, with_prompt=with_prompt, whole_groups=whole_groups)

    def __call__(self, batch: Batch, *, gradient: bool = True, states: mx.array | None = None) -> mx.array:
        """log p(target | what precedes it) in nats, (N,) float32, of a batch's N targets, padding included.

        Args:
            batch: B pairs.
            gradient: False where no gradient will be taken.
            states: what `states(batch)` gave, where that is at hand.
        """
        states = self.states(batch) if states is None else states
        if self.head is None:
            return token_logps(states, batch.targets)
        if gradient and not self.head.is_frozen:
            return trained_head_logps(self.head, states, batch.targets, profile=self.profile)
        return head_logps(self.head, states, batch.targets, profile=self.profile, gradient=gradient)

    def log_collisions(self, states: mx.array) -> mx.array:
        """log Σ_v p(v)² of what each of a batch's states predicts, nats, (N,) float32, without gradient."""
        states = mx.stop_gradient(states)
        if self.head is None:
            return mx.stop_gradient(add_collisions(states.astype(mx.float32)).log_collisions())
        return head_log_collisions(self.head, states, profile=self.profile)

    def states(self, batch: Batch) -> mx.array:
        """(N, H): what the head is given for each target; logits themselves where the head could not be told apart."""
        with self.layers():
            outputs = self.sequences(batch, lambda ids, caches: self.backbone(ids, cache=caches))
        return self.wanted(batch, outputs)

    def layers(self) -> AbstractContextManager[None]:
        """The context in which the model's layers are to be called."""
        return patched_layers(self.model, self.proofs.enabled, self.profile, self._kept_attention_bytes)

    def sequences(self, batch: Batch, run: Forward) -> tuple[mx.array, ...]:
        """`run` on each array of token ids of a batch: prefixes before the rows that need them.

        Raises:
            ValueError: the batch shares prompts, and this model cannot.
        """
        if batch.prefix_ids is None:
            return tuple(run(ids, None) for ids in batch.row_ids)
        if not self.shares_prompt:
            raise ValueError("this model cannot share prompts, and the batch does: make it with PairScorer.collate.")
        count, length = batch.prefix_ids.shape
        prefix = self._prefix_caches(length)
        outputs = [run(batch.prefix_ids, prefix)]
        outputs += [run(ids, [layer.branch(ids.shape[0] // count) for layer in prefix]) for ids in batch.row_ids]
        return tuple(outputs)

    def wanted(self, batch: Batch, outputs: Sequence[mx.array]) -> mx.array:
        """The states from which a batch's targets are predicted, of what its sequences gave."""
        prefixes, rows = ([], outputs) if batch.prefix_ids is None else (outputs[:1], outputs[1:])
        # Prefixes are wanted only where prompts are.
        parts = [*rows, *(prefixes if batch.prompt is not None else ())]
        flat = [part.reshape(-1, part.shape[-1]) for part in parts]
        return mx.take(flat[0] if len(flat) == 1 else mx.concatenate(flat), batch.places, axis=0)

    def _probe_states(self) -> mx.array:
        pairs = probe_pairs(self.profile.layout)
        # Behind these, padding stands for nothing.
        wanted = sum(len(pair.chosen_ids) + len(pair.rejected_ids) + len(pair.prompt_ids) - 1 for pair in pairs)
        return self.states(self.collate(pairs, with_prompt=True))[:wanted]

    def _matches_plain_rows(self) -> bool:
        """Whether the states of a few tokens are the same with prompts shared as without."""
        plain = self._probe_states()
        self.layout = self.layout._replace(share_prompt=True)
        try:
            return same_states(self._probe_states(), plain)
        # Whatever a model's own code raises over these caches, it can run prompts once per completion.
        except Exception:
            return False
        finally:
            self.layout = self.layout._replace(share_prompt=False)


def pair_logps(
    scorer: PairScorer,
    batch: Batch,
    *,
    nll_tokens_per_pair: float | mx.array | None = None,
    gradient: bool = True,
    states: mx.array | None = None,
    wanted: Wanted = SUMS_ALONE,
) -> PairLogProbs:
    """Summed log-probabilities of both completions of each pair, and the NLL of the chosen side.

    Args:
        scorer: the policy.
        batch: B pairs, collated with their prompts where `nll_tokens_per_pair` is given.
        nll_tokens_per_pair: None for `nll="completion"`, the mean over a pair's chosen completion tokens
            (Hong et al. 2024, eq. 2). For `nll="sequence"`, the predicted tokens of prompt + chosen per pair, averaged
            over the whole step batch this one is part of: the mean of `nll` over the step's pairs is then the token
            mean over prompt and chosen completion together, however the step is cut into micro-batches.
        gradient: False where no gradient will be taken.
        states: what `scorer.states(batch)` gave, where that is at hand.
        wanted: what the loss looks at besides.

    Raises:
        ValueError: the NLL of prompts is asked for, and the batch was collated without them.
    """
    states = scorer.states(batch) if states is None else states
    logps = scorer(batch, gradient=gradient, states=states)
    chosen, rejected = _sums(logps, batch.chosen), _sums(logps, batch.rejected)
    chosen_tokens = batch.chosen.sum(axis=1).astype(mx.float32)
    rejected_tokens = batch.rejected.sum(axis=1).astype(mx.float32)
    if nll_tokens_per_pair is None:
        nll = -chosen / chosen_tokens
    elif batch.prompt is None:
        raise ValueError("the NLL of whole sequences needs a batch that was collated with its prompts.")
    else:
        nll = -(_sums(logps, batch.prompt) + chosen) / nll_tokens_per_pair
    found = PairLogProbs(chosen, rejected, chosen_tokens, rejected_tokens, nll)
    if wanted.tails:
        shared = mx.minimum(chosen_tokens, rejected_tokens)
        tails = (_sums(logps, _behind(members, shared)) for members in (batch.chosen, batch.rejected))
        found = found._replace(**dict(zip(("chosen_tail", "rejected_tail"), tails, strict=True)))
    if wanted.alignment:
        likeness = mx.stop_gradient(logps) - scorer.log_collisions(states)
        found = found._replace(
            chosen_alignment=_sums(likeness, batch.chosen) / chosen_tokens,
            rejected_alignment=_sums(likeness, batch.rejected) / rejected_tokens,
        )
    return found


def _sums(logps: mx.array, members: mx.array) -> mx.array:
    """(B,) sums of (N,) log-probs over each row of `members`, (B, N)."""
    return mx.where(members, logps, 0.0).sum(axis=1)


def _behind(members: mx.array, length: mx.array) -> mx.array:
    """(B, N) those of each row's members that come after its first `length`, (B,)."""
    # Targets of one completion lie in its order.
    return members & (members.astype(mx.int32).cumsum(axis=1) > length[:, None])


def group_logps(
    scorer: PairScorer, batch: Batch, *, gradient: bool = True, states: mx.array | None = None
) -> GroupLogProbs:
    """Summed log-probabilities of every completion of whole groups.

    Args:
        scorer: the policy.
        batch: B groups, collated with `whole_groups`.
        gradient: False where no gradient will be taken.
        states: what `scorer.states(batch)` gave, where that is at hand.
    """
    assert batch.groups is not None
    logps = scorer(batch, gradient=gradient, states=states)
    members = batch.groups.completions
    sums = mx.where(members, logps, 0.0).sum(axis=2)
    return GroupLogProbs(sums, members.sum(axis=2).astype(mx.float32), batch.groups.scores)


def log_probs(
    scorer: PairScorer,
    batch: Batch,
    *,
    nll_tokens_per_pair: float | mx.array | None = None,
    gradient: bool = True,
    states: mx.array | None = None,
    wanted: Wanted = SUMS_ALONE,
) -> LogProbs:
    """`group_logps` of a batch of whole groups, `pair_logps` of another."""
    if batch.groups is not None:
        return group_logps(scorer, batch, gradient=gradient, states=states)
    tokens = nll_tokens_per_pair
    return pair_logps(scorer, batch, nll_tokens_per_pair=tokens, gradient=gradient, states=states, wanted=wanted)


def join_logps(parts: Sequence[AnyLogProbs]) -> AnyLogProbs:
    """Log-probs of several batches as those of one; groups are filled up to the most completions of all."""
    columns: list[Any] = [
        None if column[0] is None else mx.concatenate(_as_wide(column)) for column in zip(*parts, strict=True)
    ]
    return type(parts[0])(*columns)


def _as_wide(columns: Sequence[mx.array]) -> list[mx.array]:
    """Arrays (B, K) with zeros behind, so that all are as wide as the widest; those of one axis as they are."""
    if columns[0].ndim == 1:
        return list(columns)
    width = max(column.shape[1] for column in columns)
    return [mx.pad(column, [(0, 0), (0, width - column.shape[1])]) for column in columns]
