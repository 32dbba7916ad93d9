"""Exact attention in blocks of query rows, without the scores a backward pass need not keep.

mlx-lm's layers call `mx.fast.scaled_dot_product_attention`. Where a backend has no fused kernel for it, or none for its
gradient, MLX makes the whole (rows x keys) score matrix, half of it masked away, and on a CPU keeps it for the backward
pass. Here scores exist for one block of query rows at a time, and only for keys that some row of the block may see. The
backward pass recomputes a block's weights or, where that costs more than memory does, finds them kept.
The result is attention itself, not an approximation of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from orpo_mlx.engine.fast_exp import exp, on_cpu

_BLOCK_BYTES = 2 << 20
KEPT_BYTES = 8 << 20
_FEWEST_ROWS = 32
_FAR = 1e9
# e^-50 = 2e-22 is nothing beside a weight of 1 in float32. Smaller ones, times a small gradient, leave the range of
# normal numbers, and CPUs take some hundred cycles for each number outside of it.
_LOWEST = -50.0

model_attention = mx.fast.scaled_dot_product_attention
"""MLX's own, whatever stands in its place later."""


class Block(NamedTuple):
    """Query rows [first, last) and the keys [low, high) that any of them may see."""

    first: int
    last: int
    low: int
    high: int


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: Any = None,
    kept_bytes: int = KEPT_BYTES,
    rows: int | None = None,
) -> mx.array:
    """softmax(scale·q kᵀ + mask) v.

    Args:
        q: (B, heads, L, D).
        k: (B, key heads, K, D); each serves heads / key heads query heads.
        v: (B, key heads, K, D').
        scale: multiplies the scores.
        mask: None, "causal" (the last row sees all K keys), or (L, K) or (B, 1, L, K): boolean, true where a row sees
            a key, or numbers that are added to the scores.
        kept_bytes: keep the weights for the backward pass, where the forward pass makes them (on a CPU), while they
            take no more than this, so that memory does not grow with the square of the length.
        rows: query rows of a block; None takes what fits 2 MiB of scores.

    Returns:
        (B, heads, L, D'), of q's dtype.
    """
    blocks = _blocks(mask, q, k, rows)
    in_blocks = on_cpu()
    work = _Work(blocks, scale, mask, in_blocks and _weight_bytes(blocks, q) <= kept_bytes)

    def forward(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return _forward(q, k, v, work) if in_blocks else [model_attention(q, k, v, scale=scale, mask=mask)]

    function: Any = mx.custom_function(forward)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        return _backward(primals, cotangents[0], outputs, work)

    result: mx.array = function(q, k, v)[0]
    return result


class _Work(NamedTuple):
    """What forward and backward pass have in common beside the arrays."""

    blocks: list[Block]
    scale: float
    mask: Any
    keep: bool


def _forward(q: mx.array, k: mx.array, v: mx.array, work: _Work) -> list[mx.array]:
    """The attention's value and, where they are kept, every block's weights and their row sums."""
    outputs: list[mx.array] = []
    kept: list[mx.array] = []
    for block in work.blocks:
        parts = [_rows(q, block), _keys(k, block), _keys(v, block)]
        parts = mx.depends(parts, outputs[-1:]) if outputs else parts
        weights, total = _weights(parts[0] * work.scale, parts[1], _added(work.mask, block, q, k))
        outputs.append(((weights @ parts[2]) / total).reshape(*parts[0].shape[:3], -1))
        kept += [weights, total]
    return [mx.concatenate(outputs, axis=2), *(kept if work.keep else [])]


def _backward(
    primals: Sequence[mx.array], cotangent: mx.array, outputs: Sequence[mx.array], work: _Work
) -> tuple[mx.array, ...]:
    """Gradients towards q, k and v, block by block; `outputs` are those of `_forward`."""
    q, k, v = primals
    grad_q: list[mx.array] = []
    grad_k, grad_v = mx.zeros_like(k), mx.zeros_like(v)
    for number, block in enumerate(work.blocks):
        parts = [_rows(each, block) for each in (q, cotangent, outputs[0])]
        parts = mx.depends(parts, [grad_q[-1], grad_k, grad_v]) if grad_q else parts
        queries, keys = parts[0] * work.scale, _keys(k, block)
        weights, total = (
            outputs[1 + 2 * number : 3 + 2 * number]
            if work.keep
            else _weights(queries, keys, _added(work.mask, block, q, k))
        )
        # Weights are not normalised: rows of the small arrays are divided instead.
        grads = _grouped(parts[1], k) / total
        inner = (grads * _grouped(parts[2], k)).sum(axis=-1, keepdims=True)
        slopes = weights * (grads @ _keys(v, block).swapaxes(-1, -2) - inner)
        grad_q.append(((slopes @ keys) * work.scale).reshape(parts[0].shape))
        grad_k = grad_k + _put_back(slopes.swapaxes(-1, -2) @ _grouped(queries, k), block, k)
        grad_v = grad_v + _put_back(weights.swapaxes(-1, -2) @ grads, block, v)
    return mx.concatenate(grad_q, axis=2), grad_k, grad_v


def fits(q: mx.array, mask: Any, options: dict[str, Any]) -> bool:
    """Whether `attention` takes such a call of `mx.fast.scaled_dot_product_attention`."""
    known_mask = mask is None or isinstance(mask, str) or mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1)
    return q.shape[2] > 1 and known_mask and all(value is None for value in options.values())


def _weight_bytes(blocks: Sequence[Block], q: mx.array) -> int:
    """What the weights of all blocks take."""
    cells = sum((block.last - block.first) * (block.high - block.low) for block in blocks)
    return cells * q.itemsize * q.shape[0] * q.shape[1]


def _blocks(mask: Any, q: mx.array, k: mx.array, rows: int | None) -> list[Block]:
    batch, heads, length, _ = q.shape
    keys = k.shape[2]
    size = rows or max(_FEWEST_ROWS, _BLOCK_BYTES // (4 * batch * heads * keys))
    spans = [(first, min(first + size, length)) for first in range(0, length, size)]
    if isinstance(mask, str):
        return [Block(first, last, 0, keys - length + last) for first, last in spans]
    if mask is None or mask.dtype != mx.bool_:
        return [Block(first, last, 0, keys) for first, last in spans]
    seen = np.array(mx.any(mask.reshape(-1, *mask.shape[-2:]), axis=0))
    blocks = []
    for first, last in spans:
        columns = np.flatnonzero(seen[first:last].any(axis=0))
        low, high = (int(columns[0]), int(columns[-1]) + 1) if columns.size else (0, keys)
        blocks.append(Block(first, last, low, high))
    return blocks


def _rows(x: mx.array, block: Block) -> mx.array:
    return x[:, :, block.first : block.last]


def _keys(x: mx.array, block: Block) -> mx.array:
    return x[:, :, block.low : block.high]


def _grouped(x: mx.array, k: mx.array) -> mx.array:
    """(B, heads, rows, D) as (B, key heads, heads per key head · rows, D): one product for all rows a key serves."""
    return x.reshape(k.shape[0], k.shape[1], -1, x.shape[-1])


def _put_back(x: mx.array, block: Block, k: mx.array) -> mx.array:
    return mx.pad(x, [(0, 0), (0, 0), (block.low, k.shape[2] - block.high), (0, 0)])


def _weights(queries: mx.array, keys: mx.array, added: mx.array | None) -> tuple[mx.array, mx.array]:
    """exp(scores - their maximum) and its row sums, for scaled queries (B, heads, rows, D): softmax is their quotient.

    Shapes: (B, key heads, heads per key head · rows, keys), and 1 in place of keys. Sums are float32.
    """
    scores = _grouped(queries, keys) @ keys.swapaxes(-1, -2)
    if added is not None:
        batch, heads, rows, _ = queries.shape
        scores = (scores.reshape(batch, heads, rows, -1) + added).reshape(scores.shape)
    weights = exp(scores - scores.max(axis=-1, keepdims=True), lowest=_LOWEST)
    total = weights.astype(mx.float32).sum(axis=-1, keepdims=True)
    return weights, total.astype(weights.dtype)


def _added(mask: Any, block: Block, q: mx.array, k: mx.array) -> mx.array | None:
    """What a block's scores receive, (rows, keys) or (B, 1, rows, keys) of q's dtype: very far below 0 where unseen."""
    if mask is None:
        return None
    if isinstance(mask, str):
        row = mx.arange(block.first, block.last)[:, None] + (k.shape[2] - q.shape[2])
        beyond = mx.minimum(row - mx.arange(block.low, block.high)[None], 0)
        return (beyond.astype(mx.float32) * _FAR).astype(q.dtype)
    part: mx.array = mask[..., block.first : block.last, block.low : block.high]
    if part.dtype != mx.bool_:
        return part.astype(q.dtype)
    return mx.where(part, mx.array(0, q.dtype), mx.array(mx.finfo(q.dtype).min, q.dtype))
