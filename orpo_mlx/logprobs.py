"""Log-probabilities of completions: the only next-token shift, mask and float32 upcast in the package.

Kept here and nowhere else: the state at position t predicts token t+1, so the first completion token is predicted from
the last prompt position; reductions over the vocabulary run in float32 whatever the model's dtype, and in two levels,
because one long float32 sum drifts; and only positions somebody asked for reach the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from orpo_mlx.shared_prompt import PrefixCache, takes_prefix_caches
from orpo_mlx.types import Batch, PairLogProbs

Head = Callable[[mx.array], mx.array]
"""Hidden states (..., H) to logits (..., V)."""

_SUM_BLOCK = 128
_CHUNK_BYTES = 16 << 20
_BACKBONES = ("model", "transformer", "backbone", "gpt_neox", "language_model")
_PROBE_TOLERANCE = 1e-3


def log_sum_exp(logits: mx.array) -> tuple[mx.array, mx.array]:
    """(m, s) with m = max_v logits_v and m + s = log Σ_v exp(logits_v) over the last axis, in float32.

    The sum runs over blocks of 128 and then over the blocks: against float64, one float32 sum over 151,936 columns is
    3.6e-4 nats off, this one about 2e-6. The two terms are kept apart, since adding a small s to a large m loses s.

    Args:
        logits: (..., V) of any float dtype.
    """
    logits = logits.astype(mx.float32)
    peak = mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    exps = mx.exp(logits - peak)
    whole = logits.shape[-1] // _SUM_BLOCK * _SUM_BLOCK
    total = exps[..., whole:].sum(axis=-1)
    if whole:
        total = total + exps[..., :whole].reshape(*logits.shape[:-1], -1, _SUM_BLOCK).sum(axis=-1).sum(axis=-1)
    return peak.squeeze(-1), mx.log(total)


def token_logps(logits: mx.array, targets: mx.array) -> mx.array:
    """log softmax(logits)[targets] in nats: (..., V) logits of any float dtype, (...) integer targets -> (...) float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets of shape {targets.shape} do not fit logits of shape {logits.shape}.")
    picked = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    peak, rest = log_sum_exp(logits)
    return (picked.astype(mx.float32) - peak) - rest


def head_logps(head: Head, hidden: mx.array, targets: mx.array, *, chunk_rows: int, gradient: bool = True) -> mx.array:
    """Log-prob of each target under a frozen head, without ever holding all logits: (N, H), (N,) -> (N,) float32.

    ∂logp/∂hidden = W[target] - softmax(hidden Wᵀ) W does not depend on the loss. So one sweep over chunks of rows takes
    both the log-prob and this (N, H) gradient, and the backward pass is a multiplication by the incoming cotangent.
    Chunks are chained one after another, or the lazy scheduler would hold the logits of all of them at once.

    The head's own parameters receive no gradient: use `token_logps(head(hidden), targets)` where they are trained.

    Args:
        head: hidden states to logits.
        hidden: (N, H).
        targets: (N,) token ids.
        chunk_rows: rows whose logits exist at one time.
        gradient: False skips the gradient, for evaluation.
    """
    if not gradient:
        return _chained(lambda x, ids: (token_logps(head(x), ids),), hidden, targets, chunk_rows)[0]

    def both(x: mx.array, ids: mx.array) -> tuple[mx.array, ...]:
        (logps,), (grads,) = mx.vjp(lambda x: token_logps(head(x), ids), [x], [mx.ones(ids.shape, mx.float32)])
        return logps, grads

    fused: Any = mx.custom_function(lambda hidden, targets: _chained(both, hidden, targets, chunk_rows))

    @fused.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        grads = cotangents[0][:, None] * outputs[1].astype(mx.float32)
        return grads.astype(primals[0].dtype), mx.zeros_like(primals[1])

    logps: mx.array = fused(hidden, targets)[0]
    return logps


def _chained(
    chunk: Callable[[mx.array, mx.array], tuple[mx.array, ...]], hidden: mx.array, targets: mx.array, rows: int
) -> tuple[mx.array, ...]:
    """`chunk` over slices of `rows` rows, each made to wait for the one before; its results joined."""
    done: list[tuple[mx.array, ...]] = []
    for start in range(0, hidden.shape[0], rows):
        part = hidden[start : start + rows]
        if done:
            part = mx.depends([part], list(done[-1]))[0]
        done.append(chunk(part, targets[start : start + rows]))
    return tuple(mx.concatenate(list(parts)) for parts in zip(*done, strict=True))


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
    that only wanted positions reach the head (`splits_head`), and whether the prompt can be run once for both
    completions (`shares_prompt`). What cannot be proven falls back to the model's plain forward.

    Args:
        model: an mlx-lm causal language model, `model(ids (R, L)) -> logits (R, L, V)`.
        share_prompt: False runs the prompt once per completion.
        split_head: False computes the logits of every position.
    """

    def __init__(self, model: nn.Module, *, share_prompt: bool = True, split_head: bool = True) -> None:
        self.model = model
        self._backbone_name = _find_backbone(model) if split_head else None
        self._padded_prefix = self.shares_prompt = False
        if share_prompt and takes_prefix_caches(model):
            self.shares_prompt = self._proves_sharing(padded=False)
            self._padded_prefix = self.shares_prompt and self._proves_sharing(padded=True)

    @property
    def splits_head(self) -> bool:
        """Whether only wanted positions reach the head."""
        return self._backbone_name is not None

    def __call__(self, batch: Batch, *, with_prompt: bool = False, gradient: bool = True) -> TokenLogProbs:
        """Per-token log-probs of a batch.

        Args:
            batch: B pairs.
            with_prompt: also those of the prompt's tokens.
            gradient: False where no gradient will be taken.
        """
        prompt, chosen, rejected = self._states(batch)
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
        picks, states, targets = [], [], []
        for hidden, ids, mask in parts:
            flat = mx.array(np.flatnonzero(np.array(mask)).astype(np.int32))
            picks.append(flat)
            states.append(mx.take(hidden.reshape(-1, hidden.shape[-1]), flat, axis=0))
            targets.append(mx.take(ids.reshape(-1), flat))
        logps = self._head_logps(mx.concatenate(states), mx.concatenate(targets), gradient)
        grids = []
        start = 0
        for flat, (_, ids, _) in zip(picks, parts, strict=True):
            grid = mx.zeros(ids.size, mx.float32).at[flat].add(logps[start : start + flat.size])
            grids.append(grid.reshape(ids.shape))
            start += flat.size
        return grids

    def _head_logps(self, states: mx.array, targets: mx.array, gradient: bool) -> mx.array:
        if self._backbone_name is None:
            return token_logps(states, targets)
        head = head_of(self.model, self._backbone_name)
        if gradient and not self._head_is_frozen():
            return token_logps(head(states), targets)
        return head_logps(head, states, targets, chunk_rows=self._chunk_rows(), gradient=gradient)

    def _states(self, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        """States after each prompt, chosen and rejected token: (B, P, ·), (B, C, ·), (B, R, ·)."""
        if not self.shares_prompt:
            return self._plain_states(batch)
        if batch.left_padding is None or self._padded_prefix:
            return self._shared_states(batch)
        # The model's attention takes no mask per row: pairs one at a time have no padding between them.
        rows = [self._shared_states(row) for row in _rows(batch)]
        width = batch.prompt_ids.shape[1]
        prompts = [mx.pad(prompt, [(0, 0), (width - prompt.shape[1], 0), (0, 0)]) for prompt, _, _ in rows]
        chosen, rejected = (mx.concatenate([row[side] for row in rows]) for side in (1, 2))
        return mx.concatenate(prompts), chosen, rejected

    def _shared_states(self, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        run = self._run
        prefix = [PrefixCache(batch.left_padding) for _ in self.model.layers]
        prompt = run(batch.prompt_ids, cache=prefix)
        chosen, rejected = (
            run(ids, cache=[layer.extend() for layer in prefix]) for ids in (batch.chosen_ids, batch.rejected_ids)
        )
        return prompt, chosen, rejected

    def _plain_states(self, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        """The same from ordinary forwards over prompt + completion, rows padded on the right."""
        width = batch.prompt_ids.shape[1]
        sides = []
        for ids in (batch.chosen_ids, batch.rejected_ids):
            rows = mx.concatenate([batch.prompt_ids, ids], axis=1)
            if batch.left_padding is None:
                sides.append(self._run(rows))
                continue
            column = mx.arange(rows.shape[1])[None]
            padding = batch.left_padding[:, None]
            # Bring each row to the left for the model (its padding turns up at the end), and its states back.
            to_left = (column + padding) % rows.shape[1]
            back = ((column - padding) % rows.shape[1])[..., None]
            sides.append(mx.take_along_axis(self._run(mx.take_along_axis(rows, to_left, axis=1)), back, axis=1))
        return sides[0][:, :width], sides[0][:, width:], sides[1][:, width:]

    @property
    def _run(self) -> Callable[..., mx.array]:
        """Ids to states: the backbone, or the whole model (states are then logits) where it could not be split."""
        run: Callable[..., mx.array] = self.model if self._backbone_name is None else self.model[self._backbone_name]
        return run

    def _head_is_frozen(self) -> bool:
        names = dict(tree_flatten(self.model.trainable_parameters()))
        return all(name.startswith(f"{self._backbone_name}.layers.") for name in names)

    def _chunk_rows(self) -> int:
        vocabulary = int(getattr(self.model.args, "vocab_size", 0)) or 1 << 17
        return max(16, _CHUNK_BYTES // (4 * vocabulary))

    def _proves_sharing(self, *, padded: bool) -> bool:
        """Whether the shared prompt gives the plain forward's states on a few tokens."""
        prompt = mx.array([[1, 2, 3, 4], [0, 0, 5, 6]] if padded else [[1, 2, 3, 4]])
        padding = mx.array([0, 2]) if padded else None
        chosen, rejected = (
            mx.broadcast_to(mx.array(ids)[None], (prompt.shape[0], 3)) for ids in ([3, 1, 2], [2, 2, 1])
        )
        some = mx.ones(chosen.shape, mx.bool_)
        mask = mx.array([[True] * 4, [False, False, True, True]])[: prompt.shape[0]]
        batch = Batch(prompt, mask, padding, chosen, some, rejected, some)
        try:
            pairs = list(zip(self._shared_states(batch), self._plain_states(batch), strict=True))
        except (AttributeError, TypeError, ValueError, NotImplementedError):
            return False
        # States of padded prompt columns mean nothing in either layout.
        pairs[0] = (pairs[0][0] * mask[..., None], pairs[0][1] * mask[..., None])
        return all(_close(shared, plain) for shared, plain in pairs)


def pair_logps(
    scorer: PairScorer, batch: Batch, *, nll_tokens_per_pair: float | None = None, gradient: bool = True
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
    """
    tokens = scorer(batch, with_prompt=nll_tokens_per_pair is not None, gradient=gradient)
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


def head_of(model: nn.Module, backbone_name: str) -> Head:
    """The model's own head as a function of hidden states, whatever it does: tied, biased, quantised, scaled, capped.

    It runs the model's own `__call__` on a stand-in whose backbone returns the given states.
    """
    call: Callable[..., mx.array] = type(model).__call__

    def head(hidden: mx.array) -> mx.array:
        states = hidden if hidden.ndim == 3 else hidden[None]
        dummy_ids = mx.zeros(states.shape[:2], mx.int32)
        logits = call(_StandIn(model, backbone_name, states), dummy_ids)
        return logits if hidden.ndim == 3 else logits[0]

    return head


class _StandIn:
    """Answers for `owner`, except that its backbone, when called, returns given hidden states."""

    def __init__(self, owner: Any, name: str | None, states: mx.array) -> None:
        self._owner, self._name, self._states = owner, name, states

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._owner, name)
        return _StandIn(value, None, self._states) if name == self._name else value

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._states


def _find_backbone(model: nn.Module) -> str | None:
    """Name of the attribute that maps ids to the head's input, proven on a few tokens; None where there is none."""
    ids = mx.array([[1, 2, 3, 1, 2]], mx.int32)
    for name in _BACKBONES:
        backbone: Any = model.get(name)
        if not isinstance(backbone, nn.Module) or not hasattr(backbone, "layers"):
            continue
        try:
            if _close(head_of(model, name)(backbone(ids)), model(ids)):
                return name
        except (AttributeError, TypeError, ValueError):
            continue
    return None


def _close(found: mx.array, expected: mx.array) -> bool:
    """Equal up to rounding, relative to the largest value; half precision rounds more than float32."""
    found, wanted = found.astype(mx.float32), expected.astype(mx.float32)
    tolerance = _PROBE_TOLERANCE if expected.dtype == mx.float32 else 50 * _PROBE_TOLERANCE
    if found.shape != wanted.shape:
        return False
    return bool((mx.abs(found - wanted).max() <= tolerance * mx.abs(wanted).max()).item())


def _rows(batch: Batch) -> list[Batch]:
    """Each pair as a batch of one without padding before its prompt."""
    assert batch.left_padding is not None
    rows = []
    for row, padding in enumerate(np.array(batch.left_padding).tolist()):
        one = Batch(*(field[row : row + 1] for field in batch if field is not None))
        prompt_ids, prompt_mask = one.prompt_ids[:, padding:], one.prompt_mask[:, padding:]
        rows.append(one._replace(prompt_ids=prompt_ids, prompt_mask=prompt_mask, left_padding=None))
    return rows
