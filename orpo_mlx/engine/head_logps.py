"""Hidden states to log-probs of given tokens, and their gradient in the same sweep over the head.

Reductions over the vocabulary run in float32 whatever the model's dtype, and in two levels, because one long float32
sum drifts. All logits never exist at one time: the head is run on tiles of rows and vocabulary, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from orpo_mlx.device_profile import DeviceProfile
from orpo_mlx.engine.functions.dropout import dropout_from, dropout_keys, has_dropout
from orpo_mlx.engine.functions.fast_exp import exp
from orpo_mlx.engine.lm_head import ModelHead

Head = Callable[[mx.array], mx.array]
"""Hidden states (..., H) to logits (..., V)."""

_SUM_BLOCK = 128
# However large the vocabulary: fewer rows than this make a product that waits for memory alone.
_FEWEST_ROWS = 16


def log_sum_exp(logits: mx.array) -> tuple[mx.array, mx.array]:
    """(m, s) with m = max_v logits_v and m + s = log Σ_v exp(logits_v) over the last axis, in float32.

    The sum runs over blocks of 128 and then over the blocks: against float64, one float32 sum over 151,936 columns is
    3.6e-4 nats off, this one about 2e-6. The two terms are kept apart, since adding a small s to a large m loses s.

    Args:
        logits: (..., V) of any float dtype.
    """
    logits = logits.astype(mx.float32)
    # Whatever is taken off, m + s is the same, so the gradients through the maximum would cancel each other.
    peak = mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    exps = mx.exp(logits - peak)
    return peak.squeeze(-1), mx.log(sum_in_blocks(exps))


def sum_in_blocks(terms: mx.array) -> mx.array:
    """Σ over the last axis in two levels."""
    whole = terms.shape[-1] // _SUM_BLOCK * _SUM_BLOCK
    total = terms[..., whole:].sum(axis=-1)
    if whole:
        total = total + terms[..., :whole].reshape(*terms.shape[:-1], -1, _SUM_BLOCK).sum(axis=-1).sum(axis=-1)
    return total


def log_softmax(logits: mx.array) -> mx.array:
    """log softmax over the last axis, in nats: (..., V) of any float dtype -> (..., V) float32, by `log_sum_exp`.

    MLX's own sums in one level on a CPU: over 49,152 columns it is 1.4e-4 nats off in every one of them.
    """
    peak, rest = log_sum_exp(logits)
    return (logits.astype(mx.float32) - peak[..., None]) - rest[..., None]


def kl_divergence(logps: mx.array, others: mx.array) -> mx.array:
    """KL(p ‖ q) = Σ_v exp(log p_v) (log p_v - log q_v) in nats, of log-probs (..., V) in float32 -> (...)."""
    return sum_in_blocks(mx.exp(logps) * (logps - others))


def token_logps(logits: mx.array, targets: mx.array, *, native: bool = False) -> mx.array:
    """log softmax(logits)[targets] in nats: (..., V) logits of any float dtype, (...) integer targets -> (...) float32.

    Args:
        logits: (..., V).
        targets: (...).
        native: whether MLX's kernel takes it, which has a gradient and makes nothing of the logits' size but that; see
            `DeviceProfile.native_cross_entropy`.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets of shape {targets.shape} do not fit logits of shape {logits.shape}.")
    if native:
        return -mx.fast.cross_entropy(logits, targets)
    picked = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    peak, rest = log_sum_exp(logits)
    return (picked.astype(mx.float32) - peak) - rest


def head_logps(
    head: ModelHead, hidden: mx.array, targets: mx.array, *, profile: DeviceProfile, gradient: bool = True
) -> mx.array:
    """Log-prob of each target under a frozen head, without ever holding all logits: (N, H), (N,) -> (N,) float32.

    ∂logp/∂hidden = ∂logit[target]/∂hidden - Σ_v softmax_v ∂logit_v/∂hidden, for a plain head W[target] - softmax W,
    does not depend on the loss. So one sweep takes both the log-prob and this (N, H) gradient, and the backward pass is
    a multiplication by the incoming cotangent. The sweep goes over tiles of rows and tokens, as FlashAttention's does
    over keys (Dao et al. 2022): sums are rescaled when a larger logit turns up. Tiles wait for one another, or the lazy
    scheduler would hold several at once.

    The head's own parameters receive no gradient: `trained_head_logps` is for where they are trained.

    Args:
        head: the model's head; where it cannot be run in tiles, rows are taken a few at a time.
        hidden: (N, H).
        targets: (N,) token ids.
        profile: how many rows and tokens a tile has.
        gradient: False skips the gradient, for evaluation.
    """
    chunk = tiled_logps if head.tiles else whole_logps
    rows = profile.head_tile_rows if head.tiles else chunk_rows(head, profile)

    def sweep(hidden: mx.array, targets: mx.array) -> list[mx.array]:
        done: list[list[mx.array]] = []
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows]
            part = mx.depends([part], done[-1])[0] if done else part
            done.append(chunk(head, part, targets[start : start + rows], profile, gradient))
        return [mx.concatenate(list(parts)) for parts in zip(*done, strict=True)]

    if not gradient:
        return sweep(hidden, targets)[0]
    function: Any = mx.custom_function(sweep)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        grads = cotangents[0][:, None] * outputs[1].astype(mx.float32)
        return grads.astype(primals[0].dtype), mx.zeros_like(primals[1])

    logps: mx.array = function(hidden, targets)[0]
    return logps


def head_log_collisions(head: ModelHead, hidden: mx.array, *, profile: DeviceProfile) -> mx.array:
    """log Σ_v p(v)² of the distribution that each state predicts, without gradient: (N, H) -> (N,) float32, nats.

    That is the log-prob that two tokens drawn from it are the same (Zhou et al. 2024, eq. 2). The head is run in tiles
    as in `head_logps`, once more: what only one loss wants costs the others nothing.
    """
    width = profile.head_tile_tokens if head.tiles else head.vocabulary
    rows = profile.head_tile_rows if head.tiles else chunk_rows(head, profile)
    done: list[mx.array] = []
    for start in range(0, hidden.shape[0], rows):
        part = hidden[start : start + rows]
        sums: CollisionSums | None = None
        for low in range(0, head.vocabulary, width):
            tokens = slice(low, min(low + width, head.vocabulary)) if head.tiles else None
            before = done[-1:] if sums is None else list(sums)
            logits = head(mx.depends([part], before)[0] if before else part, rows=tokens)
            sums = add_collisions(logits.astype(mx.float32), sums)
        assert sums is not None
        done.append(sums.log_collisions())
    return mx.stop_gradient(mx.concatenate(done))


class CollisionSums(NamedTuple):
    """Of logits so far: the largest m (n,), Σ e^(logit - m) and Σ e^2(logit - m)."""

    peak: mx.array
    total: mx.array
    squares: mx.array

    def log_collisions(self) -> mx.array:
        """log Σ p² = log Σ e^2(logit - m) - 2 log Σ e^(logit - m)."""
        return mx.log(self.squares) - 2 * mx.log(self.total)


def add_collisions(logits: mx.array, sums: CollisionSums | None = None) -> CollisionSums:
    """The sums with (n, V) float32 logits of further tokens."""
    peak = logits.max(axis=-1)
    if sums is not None:
        peak = mx.maximum(peak, sums.peak)
    exps = mx.exp(logits - peak[:, None])
    total, squares = sum_in_blocks(exps), sum_in_blocks(exps.square())
    if sums is None:
        return CollisionSums(peak, total, squares)
    shrink = mx.exp(sums.peak - peak)
    return CollisionSums(peak, sums.total * shrink + total, sums.squares * shrink.square() + squares)


def trained_head_logps(head: ModelHead, hidden: mx.array, targets: mx.array, *, profile: DeviceProfile) -> mx.array:
    """Log-prob of each target under a head that is trained: (N, H), (N,) -> (N,) float32.

    Rows go through the head a few at a time, one chunk after another; the backward pass runs each chunk again, so that
    logits of one chunk exist at a time, and gives the head's parameters their gradient as well.

    Args:
        head: the model's head.
        hidden: (N, H).
        targets: (N,) token ids.
        profile: how much a chunk's logits may take.
    """
    values = head.trained
    rows = chunk_rows(head, profile)
    starts = range(0, hidden.shape[0], rows)
    # Dropout must be drawn the same when a chunk runs again. Without any, the random state is left alone: keys that
    # nobody evaluates would grow by a few operations a step.
    keys = dropout_keys(len(starts)) if has_dropout(head.model) else None

    def chunk(start: int, part: mx.array, parameters: Sequence[mx.array]) -> mx.array:
        # The backward pass comes when the model may hold others than it held here.
        before = head.trained
        head.update(dict(zip(values, parameters, strict=True)))
        try:
            with dropout_from(None if keys is None else keys[start // rows]):
                logits = head(part)
            return token_logps(logits, targets[start : start + rows], native=profile.native_cross_entropy)
        finally:
            head.update(before)

    def forward(hidden: mx.array, *parameters: mx.array) -> mx.array:
        done: list[mx.array] = []
        for start in starts:
            part = hidden[start : start + rows]
            done.append(chunk(start, mx.depends([part], done[-1:])[0] if done else part, parameters))
        return mx.concatenate(done)

    function: Any = mx.custom_function(forward)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        hidden, *parameters = primals
        grads: list[mx.array] = []
        sums = [mx.zeros_like(parameter) for parameter in parameters]
        for start in starts:
            part = mx.depends([hidden[start : start + rows]], [*grads[-1:], *sums])[0]
            _, pulled = mx.vjp(
                lambda part, *parameters, start=start: chunk(start, part, parameters),
                [part, *parameters],
                [cotangent[start : start + rows]],
            )
            grads.append(pulled[0])
            sums = [total + share for total, share in zip(sums, pulled[1:], strict=True)]
        return mx.concatenate(grads), *sums

    logps: mx.array = function(hidden, *values.values())
    return logps


def chunk_rows(head: ModelHead, profile: DeviceProfile) -> int:
    """Rows whose logits take what the profile gives a chunk."""
    return max(_FEWEST_ROWS, (profile.head_chunk_mib << 20) // (4 * head.vocabulary))


class TileSums(NamedTuple):
    """Of tiles so far: largest logit m (n, 1), Σ e^(logit - m) (n, 1), and Σ e^(logit - m) ∂logit/∂hidden (n, H)."""

    peak: mx.array
    total: mx.array
    grad: mx.array | None


def tiled_logps(
    head: ModelHead, hidden: mx.array, targets: mx.array, profile: DeviceProfile, gradient: bool
) -> list[mx.array]:
    """[logps] or [logps, gradients] of a few rows."""
    chosen, at_target = with_pull_back(partial(head, rows=targets), hidden)
    # Row i's own token is column i of the logits for the targets.
    picked = mx.diag(chosen).astype(mx.float32)[:, None]
    sums: TileSums | None = None
    for low in range(0, head.vocabulary, profile.head_tile_tokens):
        tokens = slice(low, min(low + profile.head_tile_tokens, head.vocabulary))
        part = hidden if sums is None else mx.depends([hidden], [each for each in sums if each is not None])[0]
        sums = add_tile(with_pull_back(partial(head, rows=tokens), part), sums, profile, gradient)
    assert sums is not None
    logps = ((picked - sums.peak) - mx.log(sums.total)).squeeze(-1)
    if sums.grad is None:
        return [logps]
    return [logps, at_target(mx.eye(targets.size, dtype=chosen.dtype)) - sums.grad / sums.total]


def add_tile(run: tuple[mx.array, Head], sums: TileSums | None, profile: DeviceProfile, gradient: bool) -> TileSums:
    tile, pull_back = run
    logits = tile.astype(mx.float32)
    peak = logits.max(axis=-1, keepdims=True)
    if sums is not None:
        peak = mx.maximum(peak, sums.peak)
    exps = exp(logits - peak, polynomial=profile.polynomial_exp)
    total = sum_in_blocks(exps)[:, None]
    grad = pull_back(exps.astype(tile.dtype)).astype(mx.float32) if gradient else None
    if sums is None:
        return TileSums(peak, total, grad)
    shrink = exp(sums.peak - peak, polynomial=profile.polynomial_exp)
    if grad is not None and sums.grad is not None:
        grad = sums.grad * shrink + grad
    return TileSums(peak, sums.total * shrink + total, grad)


def whole_logps(
    head: ModelHead, hidden: mx.array, targets: mx.array, profile: DeviceProfile, gradient: bool
) -> list[mx.array]:
    """The same from the logits of the whole vocabulary."""

    def logps(hidden: mx.array) -> mx.array:
        return token_logps(head(hidden), targets, native=profile.native_cross_entropy)

    if not gradient:
        return [logps(hidden)]
    (found,), (grads,) = mx.vjp(logps, [hidden], [mx.ones(targets.shape, mx.float32)])
    return [found, grads]


def with_pull_back(function: Head, x: mx.array) -> tuple[mx.array, Head]:
    """function(x), and what pulls a cotangent of it back to x; a linear function's second forward is not evaluated."""

    def pull_back(cotangent: mx.array) -> mx.array:
        (grad,) = mx.vjp(function, [x], [cotangent])[1]
        return grad

    return function(x), pull_back
