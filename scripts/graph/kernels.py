"""What one node of a graph launches on Metal, reads, writes and multiplies.

From MLX's mlx/backend/metal and mlx/backend/gpu (0.32.2); each rule names its file. What an unevaluated graph cannot
tell is taken as good: inputs lie as their kernel wants them (else a copy goes before it: `contiguous_copy_gpu`), and
what is updated in place is not needed by anybody else (else a copy of all of it goes before: slice updates, scatters).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from scripts.graph.metal import KINDS, MOST_VECTOR_QUERIES
from scripts.graph.walker import ITEM_BYTES, Node, Operand

VIEWS = frozenset({
    # gpu/primitives.cpp: they share the input's buffer. A reshape does so where strides allow it, and copies else.
    "AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Flatten",
    "NumberOfElements", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
})  # fmt: skip
REDUCTIONS = frozenset({"And", "Max", "Min", "Or", "Prod", "Sum"})
ONE_BLOCK_REDUCTION = 4096
"""Elements up to which one threadgroup reduces a whole array: reduce.cpp, REDUCE_N_READS · 1024."""
NORM_GROUPS = 512
"""Most threadgroups of a norm's backward, each with a row of the weight's gradient: normalization.cpp."""
ATTENTION_TILE = 1024
"""Rows and columns of a tile of scores in the fused backward of attention (0.32.4)."""
ATTENTION_TILE_KERNELS = 9
"""Kernels per tile there: five products, and what makes P and dS of S and dP (a guess)."""
DELTA_CHUNK = 64
"""Positions of a chunk of the fused gated delta rule (a guess)."""
SPLIT_K_TILES = 2048
"""Tiles of 16 x 16 up to which a product is split along K on Max and Ultra: matmul.cpp; 1024 on others."""
QUANTIZED_THREADGROUPS = 512
"""Threadgroups that a quantised product is split up for: quantized.cpp, `qmm_splitk`."""


class Product(NamedTuple):
    """A matrix product: `batch` times (m, k) by (k, n)."""

    batch: int
    m: int
    n: int
    k: int
    parts: int = 1
    """Of K, computed apart and then added."""

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.batch * self.m * self.n * self.k


class Work(NamedTuple):
    """What a node does on the device."""

    family: str
    """"products", "quantized products", "attention", "norms and rope", "loss", "custom kernels", "copies" or
    "elementwise"."""
    launches: int
    nbytes: float
    """Read and written."""
    flops: float = 0.0
    """Of matrix products; other arithmetic is hidden behind the memory."""
    product: Product | None = None
    """What fills the device's cores."""
    dtype: str = "f4"
    """What products are computed in."""


def dispatches(node: Node) -> int:
    """1 for a node that runs on the device, 0 for a view."""
    return int(node.name not in VIEWS)


def launches(node: Node) -> int:
    """Kernels that a node launches."""
    return 0 if node.name in VIEWS else work(node).launches


def work(node: Node) -> Work:
    """What a node, not a view, does on the device."""
    if node.name == "Marker":
        return _MARKERS[KINDS[node.kind]](node)
    if node.name in ("Matmul", "AddMM"):
        return _matmul(node)
    if node.name == "QuantizedMatmul":
        return _quantized(node)
    if node.name in REDUCTIONS:
        return Work("elementwise", _reduction_passes(node.inputs[0], node.outputs[0]), _traffic(node))
    return _moved(node) or Work("elementwise", 1, _traffic(node))


def _traffic(node: Node) -> float:
    return float(sum(operand.nbytes for operand in (*node.inputs, *node.outputs)))


def _moved(node: Node) -> Work | None:
    """Nodes that move part of an array, and do not touch the rest."""
    out = _bytes(node.outputs[0])
    if node.name == "Full":
        return Work("copies", 1, out)
    if node.name == "Concatenate":  # slicing.cpp: each input is copied into its slice.
        return Work("copies", len(node.inputs), 2 * out)
    if node.name == "Pad":  # gpu/slicing.cpp: fill, then copy.
        return Work("copies", 2, out + _bytes(node.inputs[0]))
    if node.name in ("Gather", "GatherAxis"):
        return Work("elementwise", 1, 2 * out + sum(index.nbytes for index in node.inputs[1:]))
    if node.name.startswith(("Scatter", "SliceUpdate")):
        update = node.inputs[1] if node.name.startswith("SliceUpdate") else node.inputs[-1]
        indices = sum(index.nbytes for index in node.inputs[1:] if index is not update)
        return Work("copies", 1, 3.0 * update.nbytes + indices)
    if node.name.startswith("DynamicSlice"):  # primitives.cpp: where it begins is computed by a kernel.
        return Work("copies", 2, 2 * min(out, _bytes(node.inputs[min(1, len(node.inputs) - 2)])))
    return None


def _matmul(node: Node) -> Work:
    """matmul.cpp: vectors by gemv; products of few tiles and long K in parts, added by a second kernel."""
    a, b, out = node.inputs[0], node.inputs[1], node.outputs[0]
    batch, m, n, k = math.prod(out.shape[:-2]), out.shape[-2], out.shape[-1], a.shape[-1]
    if math.prod(b.shape[:-2]) == 1:
        batch, m = 1, batch * m
    few = math.ceil(m / 16) * math.ceil(n / 16) <= SPLIT_K_TILES
    parts = 1
    if batch == 1 and min(m, n) > 1 and few and k >= max(128, m, n):
        wanted = k // 16 / (math.ceil(m / 32) * math.ceil(n / 32))
        parts = min(max(2, _power_of_two(wanted)), 32)
    product = Product(batch, m, n, k, parts)
    partial_sums = 0.0 if parts == 1 else 8.0 * parts * m * n
    return Work("products", 1 + (parts > 1), _traffic(node) + partial_sums, product.flops, product, a.dtype)


def _quantized(node: Node) -> Work:
    """quantized.cpp: few threadgroups and weights as (N, K): in parts along K, added by a second kernel."""
    x, weight, scales, out = node.inputs[0], node.inputs[1], node.inputs[2], node.outputs[0]
    m, n, k = math.prod(out.shape[:-1]), out.shape[-1], x.shape[-1]
    parts = 1
    if weight.shape[-2] == n and len(weight.shape) == 2 and m > MOST_VECTOR_QUERIES:
        group = max(32, k // scales.shape[-1])
        parts = min(QUANTIZED_THREADGROUPS // (math.ceil(m / 32) * math.ceil(n / 32)), k // group)
        while parts > 1 and k % (parts * group):
            parts -= 1
        parts = max(1, parts)
    product = Product(1, m, n, k, parts)
    partial_sums = 0.0 if parts == 1 else 2.0 * parts * _bytes(out)
    return Work("quantized products", 1 + (parts > 1), _traffic(node) + partial_sums, product.flops, product, x.dtype)


def _reduction_passes(a: Operand, out: Operand) -> int:
    """reduce.cpp: a whole array in two passes where it is large, columns where they are long and few."""
    if out.size == 1:
        return 1 + (a.size > ONE_BLOCK_REDUCTION)
    last_is_reduced = len(a.shape) != len(out.shape) or a.shape[-1] != out.shape[-1]
    return 1 if last_is_reduced else _column_passes(a.size // out.size, out.size)


def _column_passes(rows: int, columns: int) -> int:
    """reduce.cpp, `strided_reduce_general_dispatch`."""
    return 1 + (rows > 256 and columns / 32 < 1024)


def _norm(node: Node) -> Work:
    return Work("norms and rope", 1, _traffic(node))


def _norm_vjp(node: Node) -> Work:
    """normalization.cpp: one kernel for the input's gradient, which leaves rows of the weight's to be summed up."""
    x, weights = node.inputs[0], node.inputs[1:-1]
    rows = x.size // x.shape[-1]
    groups = math.ceil(rows / math.ceil(rows / NORM_GROUPS))
    passes = _column_passes(groups, x.shape[-1]) * len(weights)
    sums = 2.0 * groups * x.shape[-1] * ITEM_BYTES[x.dtype] * len(weights)
    return Work("norms and rope", 1 + passes, _traffic(node) + sums)


def _rope(node: Node) -> Work:
    """rope.cpp: what is not turned is copied first."""
    return Work("norms and rope", 1 + node.detail, _traffic(node) + node.detail * 2 * _bytes(node.outputs[0]))


def _attention(node: Node) -> Work:
    """scaled_dot_product_attention.cpp: one kernel, that passes over what a causal mask hides; few queries to many keys
    take two."""
    q, k = node.inputs[0], node.inputs[1]
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    seen = (keys - queries / 2) / keys if node.detail else 1.0
    flops = 2.0 * batch * heads * queries * keys * (dim + node.inputs[2].shape[3]) * seen
    passes = 1 + (queries <= MOST_VECTOR_QUERIES and keys >= 1024)
    return Work("attention", passes, _traffic(node), flops, None, q.dtype)


def _attention_vjp(node: Node) -> Work:
    """Tile after tile of 1024 x 1024 scores, those that a causal mask hides passed over: S, dP, dV, dK and dQ are
    products, and S, P, dP and dS go through memory (P and dS also turned)."""
    q, k = node.inputs[0], node.inputs[1]
    batch, heads, queries, dim = q.shape
    tiles = _tiles(queries, k.shape[2], causal=bool(node.detail))
    cells = batch * heads * sum(tiles)
    nbytes = _traffic(node) + 10.0 * cells * ITEM_BYTES[q.dtype]
    return Work("attention", 1 + ATTENTION_TILE_KERNELS * len(tiles), nbytes, 10.0 * cells * dim, None, q.dtype)


def _tiles(queries: int, keys: int, *, causal: bool) -> list[int]:
    """Scores of each tile that has any to be seen; the last query sees the last key."""
    tiles = []
    for top in range(0, queries, ATTENTION_TILE):
        bottom = min(top + ATTENTION_TILE, queries)
        for left in range(0, keys, ATTENTION_TILE):
            if not causal or left <= bottom - 1 + keys - queries:
                tiles.append((bottom - top) * (min(left + ATTENTION_TILE, keys) - left))
    return tiles


def _loss(node: Node) -> Work:
    return Work("loss", 1, _traffic(node))


def _custom(node: Node) -> Work:
    return Work("custom kernels", 1, _traffic(node))


def _gated_delta(node: Node) -> Work:
    """Per position and value head: three products with the state (Dk · Dv), and two products within a chunk."""
    key, value = node.inputs[1], node.inputs[2]
    batch, positions, heads, value_dim = value.shape
    one = 6.0 * key.shape[3] * value_dim + 4.0 * DELTA_CHUNK * (key.shape[3] + value_dim)
    again = 2.5 if KINDS[node.kind].endswith("VJP") else 1.0
    return Work("attention", 1, _traffic(node), again * batch * positions * heads * one, None, value.dtype)


def _bytes(operand: Operand) -> float:
    return float(operand.size * ITEM_BYTES[operand.dtype])


def _power_of_two(value: float) -> int:
    return 1 if value <= 1 else 1 << math.ceil(math.log2(value))


_MARKERS = {
    "RMSNorm": _norm,
    "LayerNorm": _norm,
    "RMSNormVJP": _norm_vjp,
    "LayerNormVJP": _norm_vjp,
    "RoPE": _rope,
    "ScaledDotProductAttention": _attention,
    "ScaledDotProductAttentionVJP": _attention_vjp,
    "CrossEntropy": _loss,
    "CrossEntropyVJP": _loss,
    "GatedDeltaUpdate": _gated_delta,
    "GatedDeltaUpdateVJP": _gated_delta,
    "CustomKernel": _custom,
}
