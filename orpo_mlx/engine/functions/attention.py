"""Exact attention in blocks of query rows, without the scores a backward pass need not keep.

mlx-lm's layers call `mx.fast.scaled_dot_product_attention`. Where a backend has no fused kernel for it, or none for its
gradient, MLX makes the whole (rows x keys) score matrix, half of it masked away, and keeps it for the backward pass.
Here scores exist for one block of query rows at a time, and only for keys that some row of the block may see. The
backward pass recomputes a block's weights or, where that costs more than memory does, finds them kept.
The result is attention itself, not an approximation of it. Scores and sums are float32 whatever the arrays are, so a
gradient that is summed over many blocks is rounded once, and no masked score leaves the range of its type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from orpo_mlx.device_profile import DeviceProfile
from orpo_mlx.engine.functions.fast_exp import exp

KEPT_BYTES = 8 << 20
# e^-50 = 2e-22 is nothing beside a weight of 1 in float32. Smaller ones, times a small gradient, leave the range of
# normal numbers, and CPUs take some hundred cycles for each number outside of it.
_LOWEST = -50.0
_HIDDEN = float(np.finfo(np.float32).min)
_FEW_QUERIES = 8
# Those of MLX's fused backward pass on Metal (0.32.4); others would make and keep all scores there.
_FUSED_WIDTHS = (64, 72, 80, 96, 128, 192, 256)

model_attention = mx.fast.scaled_dot_product_attention
"""MLX's own, whatever stands in its place later."""


def guarded_attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any
) -> mx.array:
    """MLX's own attention, kept from a kernel that has no gradient.

    Under a gradient, MLX 0.32.4 on Metal takes a kernel for at most 8 queries without an array mask that raises when it
    is evaluated, since it gives no log-sum-exp. An array mask that says the same takes another way; on a CPU the result
    is the same to the bit. Arguments are those of `mx.fast.scaled_dot_product_attention`.
    """
    if q.shape[2] <= _FEW_QUERIES and not isinstance(mask, mx.array):
        mask = seen_keys(mask, Block(0, q.shape[2], 0, k.shape[2]), k.shape[2] - q.shape[2])
    result: mx.array = model_attention(q, k, v, scale=scale, mask=mask, **options)
    return result


def is_fused(q: mx.array, v: mx.array, mask: Any, profile: DeviceProfile) -> bool:
    """Whether MLX has a fused kernel for such a call's forward and backward pass where `profile` takes those."""
    width = q.shape[-1]
    few = q.shape[2] <= _FEW_QUERIES
    # An array mask makes it unfused, but of a few queries all scores together are small.
    return profile.native_attention and (
        few or (not isinstance(mask, mx.array) and width == v.shape[-1] and width in _FUSED_WIDTHS)
    )


def fits(q: mx.array, mask: Any, options: dict[str, Any]) -> bool:
    """Whether `attention` takes such a call of `mx.fast.scaled_dot_product_attention`."""
    known_mask = mask is None or isinstance(mask, str) or mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1)
    return q.shape[2] > 1 and known_mask and all(value is None for value in options.values())


class Block(NamedTuple):
    """Query rows [first, last) and the keys [low, high) that any of them may see."""

    first: int
    last: int
    low: int
    high: int

    def rows(self, x: mx.array) -> mx.array:
        """The block's rows of x, (B, heads, L, D)."""
        return x[:, :, self.first : self.last]

    def keys(self, x: mx.array) -> mx.array:
        """The block's keys of x, (B, key heads, K, D)."""
        return x[:, :, self.low : self.high]

    def among_all(self, x: mx.array, keys: int) -> mx.array:
        """(B, key heads, block's keys, D) as (B, key heads, K, D): 0 for the other keys."""
        return mx.pad(x, [(0, 0), (0, 0), (self.low, keys - self.high), (0, 0)])


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    profile: DeviceProfile,
    mask: Any = None,
    kept_bytes: int = KEPT_BYTES,
    rows: int | None = None,
) -> mx.array:
    """softmax(scale·q kᵀ + mask) v, and its gradients towards q, k and v.

    Args:
        q: (B, heads, L, D).
        k: (B, key heads, K, D); each serves heads / key heads query heads.
        v: (B, key heads, K, D').
        scale: multiplies the scores.
        profile: how many rows a block has, whether weights may be kept, and which exponential is taken.
        mask: None, "causal" (the last row sees all K keys), or (L, K) or (B, 1, L, K): boolean, true where a row sees
            a key, or numbers that are added to the scores. What a row that sees nothing gives is finite, no more.
        kept_bytes: keep the weights for the backward pass while they take no more than this, so that memory does not
            grow with the square of the length.
        rows: query rows of a block; None leaves it to the profile.

    Returns:
        (B, heads, L, D'), of q's dtype.
    """
    blocks = query_blocks(mask, q, k, rows, profile)
    keep = profile.kept_attention and weight_bytes(blocks, q) <= kept_bytes
    work = Work(blocks, scale, mask, keep, profile.polynomial_exp)

    def forward(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return forward_by_blocks(q, k, v, work)

    function: Any = mx.custom_function(forward)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        return backward_by_blocks(primals, cotangents[0], outputs, work)

    result: mx.array = function(q, k, v)[0]
    return result


class Work(NamedTuple):
    """What forward and backward pass have in common beside the arrays."""

    blocks: list[Block]
    scale: float
    mask: Any
    keep: bool
    polynomial_exp: bool


def forward_by_blocks(q: mx.array, k: mx.array, v: mx.array, work: Work) -> list[mx.array]:
    """The attention's value and, where they are kept, every block's weights and their row sums."""
    offset = k.shape[2] - q.shape[2]
    dtype, k, v = q.dtype, _float32(k), _float32(v)
    outputs: list[mx.array] = []
    kept: list[mx.array] = []
    for block in work.blocks:
        parts = [block.rows(q), block.keys(k), block.keys(v)]
        # One block after another, or the lazy scheduler would hold several at once.
        parts = mx.depends(parts, outputs[-1:]) if outputs else parts
        weights, total = unnormalised_weights(_float32(parts[0]) * work.scale, parts[1], work, block, offset)
        outputs.append(((weights @ parts[2]) / total).reshape(*parts[0].shape[:3], -1).astype(dtype))
        kept += [weights.astype(dtype), total]
    return [mx.concatenate(outputs, axis=2), *(kept if work.keep else [])]


def backward_by_blocks(
    primals: Sequence[mx.array], cotangent: mx.array, outputs: Sequence[mx.array], work: Work
) -> tuple[mx.array, ...]:
    """Gradients towards q, k and v, block by block; `outputs` are those of `forward_by_blocks`."""
    q, k, v = primals[0], _float32(primals[1]), _float32(primals[2])
    offset = k.shape[2] - q.shape[2]
    grad_q: list[mx.array] = []
    grad_k, grad_v = mx.zeros_like(k), mx.zeros_like(v)
    for number, block in enumerate(work.blocks):
        parts = [block.rows(each) for each in (q, cotangent, outputs[0])]
        parts = mx.depends(parts, [grad_q[-1], grad_k, grad_v]) if grad_q else parts
        rows, own_cotangent, output = map(_float32, parts)
        queries, keys = rows * work.scale, block.keys(k)
        if work.keep:
            weights, total = map(_float32, outputs[1 + 2 * number : 3 + 2 * number])
        else:
            weights, total = unnormalised_weights(queries, keys, work, block, offset)
        # Weights are not normalised; dividing the gradients of few columns by the row sums is cheaper.
        grads = _grouped(own_cotangent, k) / total
        inner = (grads * _grouped(output, k)).sum(axis=-1, keepdims=True)
        score_grads = weights * (grads @ block.keys(v).swapaxes(-1, -2) - inner)
        grad_q.append(((score_grads @ keys) * work.scale).reshape(rows.shape).astype(q.dtype))
        grad_k = grad_k + block.among_all(score_grads.swapaxes(-1, -2) @ _grouped(queries, k), k.shape[2])
        grad_v = grad_v + block.among_all(weights.swapaxes(-1, -2) @ grads, k.shape[2])
    return mx.concatenate(grad_q, axis=2), grad_k.astype(primals[1].dtype), grad_v.astype(primals[2].dtype)


def weight_bytes(blocks: Sequence[Block], q: mx.array) -> int:
    """What the weights of all blocks take."""
    cells = sum((block.last - block.first) * (block.high - block.low) for block in blocks)
    return cells * q.itemsize * q.shape[0] * q.shape[1]


def query_blocks(mask: Any, q: mx.array, k: mx.array, rows: int | None, profile: DeviceProfile) -> list[Block]:
    batch, heads, length, _ = q.shape
    keys = k.shape[2]
    fitting = (profile.attention_block_mib << 20) // (4 * batch * heads * keys)
    size = rows or max(profile.attention_rows, fitting)
    spans = [(first, min(first + size, length)) for first in range(0, length, size)]
    if isinstance(mask, str):
        return [Block(first, last, 0, keys - length + last) for first, last in spans]
    # Looking at a mask's values makes the host wait for a GPU.
    seen = None if profile.compiled else seen_by_some_row(mask)
    if seen is None:
        return [Block(first, last, 0, keys) for first, last in spans]
    blocks = []
    for first, last in spans:
        columns = np.flatnonzero(seen[first:last].any(axis=0))
        low, high = (int(columns[0]), int(columns[-1]) + 1) if columns.size else (0, keys)
        blocks.append(Block(first, last, low, high))
    return blocks


def seen_by_some_row(mask: mx.array | None) -> Any:
    """(L, K) booleans: whether query i of some row of the batch sees key j; None where the mask does not say."""
    if mask is None or mask.dtype != mx.bool_:
        return None
    try:
        return np.array(mx.any(mask.reshape(-1, *mask.shape[-2:]), axis=0))
    except ValueError:
        # A function that is being compiled has no values yet.
        return None


def _float32(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


def _grouped(x: mx.array, k: mx.array) -> mx.array:
    """(B, heads, rows, D) as (B, key heads, heads per key head · rows, D): one product for all rows a key serves."""
    return x.reshape(k.shape[0], k.shape[1], -1, x.shape[-1])


def unnormalised_weights(
    queries: mx.array, keys: mx.array, work: Work, block: Block, offset: int
) -> tuple[mx.array, mx.array]:
    """exp(scores - their maximum) and its row sums, for scaled queries (B, heads, rows, D): softmax is their quotient.

    Shapes: (B, key heads, heads per key head · rows, keys), and 1 in place of keys. All in float32.
    """
    scores = _grouped(queries, keys) @ keys.swapaxes(-1, -2)
    added = added_to_scores(work.mask, block, offset)
    if added is not None:
        batch, heads, rows, _ = queries.shape
        scores = (scores.reshape(batch, heads, rows, -1) + added).reshape(scores.shape)
    weights = exp(scores - scores.max(axis=-1, keepdims=True), polynomial=work.polynomial_exp, lowest=_LOWEST)
    return weights, weights.sum(axis=-1, keepdims=True)


def added_to_scores(mask: Any, block: Block, offset: int) -> mx.array | None:
    """What a block's scores receive, (rows, keys) or (B, 1, rows, keys) in float32.

    A masked score becomes float32's lowest number, since no score is large enough to move it. Choosing among the few
    numbers here and adding is three times as fast on a CPU as choosing among the scores of all heads.
    """
    if mask is None:
        return None
    part = seen_keys(mask, block, offset)
    if part.dtype != mx.bool_:
        return _float32(part)
    return mx.where(part, 0.0, _HIDDEN)


def seen_keys(mask: Any, block: Block, offset: int) -> mx.array:
    """An array mask of a block; `offset` is how many keys the first query of all sees beside its own."""
    if isinstance(mask, mx.array):
        return mask[..., block.first : block.last, block.low : block.high]
    keys = mx.arange(block.low, block.high)[None]
    rows = mx.arange(block.first, block.last)[:, None]
    return rows + offset >= keys if mask == "causal" else (rows >= 0) & (keys >= 0)
