"""The primitives of a Mac's GPU, by name, and with the numbers of MLX's plain ones."""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from scripts.graph.count import Cost, counting
from scripts.graph.metal import KINDS, LSE_ERROR, metal_graph
from scripts.graph.walker import zeros


def fused(cost: Cost) -> Counter[str]:
    """How often each fused primitive was counted."""
    return Counter({KINDS[node.kind]: times for node, times in cost.nodes.items() if node.name == "Marker"})


def arrays(*shapes: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    made = [mx.random.normal(shape).astype(dtype) for shape in shapes]
    mx.eval(made)
    return made


def rms_norm(x: mx.array, w: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, w, 1e-5)


def layer_norm(x: mx.array, w: mx.array, b: mx.array) -> mx.array:
    return mx.fast.layer_norm(x, w, b, 1e-5)


def rope(x: mx.array) -> mx.array:
    return mx.fast.rope(x, 4, traditional=False, base=1e4, scale=1.0, offset=3)


def rope_by_rows(x: mx.array) -> mx.array:
    freqs = mx.arange(1.0, 5.0)
    return mx.fast.rope(x, 8, traditional=True, base=None, scale=1.0, offset=mx.array([0, 5]), freqs=freqs)


def causal(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask="causal")


def unmasked(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2)


def cross_entropy(logits: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits, mx.array([1, 0, 3]))


ATTENTION = ((2, 4, 9, 64), (2, 2, 12, 64), (2, 2, 12, 64))
FUNCTIONS: list[tuple[Callable[..., mx.array], tuple[tuple[int, ...], ...], dict[str, int]]] = [
    (rms_norm, ((2, 3, 8), (8,)), {"RMSNorm": 1, "RMSNormVJP": 1}),
    (layer_norm, ((2, 3, 8), (8,), (8,)), {"LayerNorm": 1, "LayerNormVJP": 1}),
    (rope, ((2, 2, 3, 8),), {"RoPE": 2}),
    (rope_by_rows, ((2, 2, 3, 8),), {"RoPE": 2}),
    (causal, ATTENTION, {"ScaledDotProductAttention": 1, "ScaledDotProductAttentionVJP": 1}),
    (unmasked, ATTENTION, {"ScaledDotProductAttention": 1, "ScaledDotProductAttentionVJP": 1}),
    (cross_entropy, ((3, 7),), {"CrossEntropy": 1, "CrossEntropyVJP": 1}),
]


CASES = pytest.mark.parametrize(
    ("function", "shapes", "expected"), FUNCTIONS, ids=[function.__name__ for function, *_ in FUNCTIONS]
)


def value_and_gradients(function: Callable[..., mx.array], given: list[mx.array], weights: mx.array) -> Any:
    transform: Any = mx.value_and_grad(lambda *a: (function(*a) * weights).sum(), argnums=tuple(range(len(given))))
    return transform


@CASES
def test_one_primitive_each_way_with_the_plain_numbers(
    function: Callable[..., mx.array], shapes: Any, expected: dict[str, int]
) -> None:
    given = arrays(*shapes)
    (weights,) = arrays(function(*given).shape)
    plain = value_and_gradients(function, given, weights)(*given)
    mx.eval(plain)
    with counting(evaluate=True) as evaluated:
        numbers = value_and_gradients(function, given, weights)(*given)
        evaluated.add(numbers)
    with counting() as counted:
        counted.add(value_and_gradients(function, given, weights)(*given))
    assert fused(counted) == expected
    assert counted.nodes == evaluated.nodes
    np.testing.assert_allclose(np.array(numbers[0]), np.array(plain[0]), rtol=1e-5)
    for mine, theirs in zip(numbers[1], plain[1], strict=True):
        np.testing.assert_allclose(np.array(mine), np.array(theirs), rtol=1e-5, atol=1e-5)


@CASES
def test_compile_neither_fuses_nor_drops_them(
    function: Callable[..., mx.array], shapes: Any, expected: dict[str, int]
) -> None:
    given = [zeros(shape, mx.float32) for shape in shapes]
    with counting() as cost:
        weights = zeros(function(*given).shape, mx.float32)
        cost.add(mx.compile(value_and_gradients(function, given, weights))(*given))
    assert fused(cost) == expected
    assert not any(node.name == "CustomTransforms" for node in cost.nodes)


def test_a_compiled_step_gives_the_plain_numbers() -> None:
    given = arrays((2, 3, 8), (8,))
    (weights,) = arrays((2, 3, 8))
    plain = value_and_gradients(rms_norm, given, weights)(*given)
    mx.eval(plain)
    with counting(evaluate=True) as cost:
        numbers = mx.compile(value_and_gradients(rms_norm, given, weights))(*given)
        mx.eval(numbers)
    assert fused(cost) == {"RMSNorm": 1, "RMSNormVJP": 1}
    np.testing.assert_allclose(np.array(numbers[1][0]), np.array(plain[1][0]), rtol=1e-5, atol=1e-6)


def test_a_fused_primitive_is_one_node() -> None:
    (x, w) = arrays((2, 3, 8), (8,))
    with counting() as cost:
        cost.add(rms_norm(x, w))
    assert cost.nodes.total() == cost.dispatches == 1
    (node,) = cost.nodes
    assert [operand.shape for operand in node.inputs] == [(2, 3, 8), (8,)]
    assert [operand.shape for operand in node.outputs] == [(2, 3, 8)]


def attention(q: tuple[int, ...], k: tuple[int, ...], mask: Any, dtype: mx.Dtype, *, training: bool) -> str:
    """Which primitives MLX would take: "fused", "plain", or "raises"."""
    queries, keys, values = zeros(q, dtype), zeros(k, dtype), zeros(k, dtype)

    def run(q: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask=mask)

    with counting() as cost:
        try:
            cost.add(mx.grad(lambda q: run(q).sum())(queries) if training else run(queries))
        except RuntimeError as error:
            return "raises" if str(error) == LSE_ERROR else str(error)
    found = fused(cost)
    assert bool(found["ScaledDotProductAttentionVJP"]) == (training and bool(found))
    return "fused" if found else "plain"


MASK = zeros((64, 64), mx.bool_)
BF16, F32 = mx.bfloat16, mx.float32


@pytest.mark.parametrize(
    ("q", "k", "mask", "dtype", "scored", "trained"),
    [
        ((1, 4, 64, 64), (1, 2, 64, 64), "causal", F32, "fused", "fused"),
        ((1, 4, 64, 128), (1, 2, 64, 128), None, BF16, "fused", "fused"),
        ((1, 4, 64, 256), (1, 2, 64, 256), "causal", BF16, "plain", "fused"),
        ((1, 4, 64, 32), (1, 2, 64, 32), "causal", F32, "plain", "plain"),
        ((1, 4, 64, 64), (1, 2, 64, 64), MASK, F32, "fused", "plain"),
        # Few queries: the vector kernel, which gives no log-sum-exp.
        ((1, 4, 8, 64), (1, 2, 64, 64), "causal", F32, "fused", "raises"),
        ((1, 4, 1, 128), (1, 1, 64, 128), None, F32, "fused", "raises"),
        ((1, 16, 8, 64), (1, 2, 64, 64), None, F32, "plain", "plain"),
        ((1, 4, 8, 80), (1, 2, 64, 80), None, F32, "plain", "plain"),
        ((1, 4, 9, 64), (1, 2, 64, 64), "causal", F32, "fused", "fused"),
    ],
)
def test_where_attention_is_fused(q: Any, k: Any, mask: Any, dtype: mx.Dtype, scored: str, trained: str) -> None:
    assert attention(q, k, mask, dtype, training=False) == scored
    assert attention(q, k, mask, dtype, training=True) == trained


def test_a_gradient_that_is_recomputed_is_a_gradient_too() -> None:
    (x,) = arrays((1, 2, 64, 64))

    def masked(x: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0, mask=MASK)

    with counting() as cost:
        cost.add(mx.grad(lambda x: mx.checkpoint(masked)(x).sum())(x))
    assert not fused(cost)


def test_a_gradient_from_outside_is_not_taken_for_scoring() -> None:
    (x,) = arrays((1, 2, 64, 64))
    gradient = mx.grad(lambda x: mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0, mask=MASK).sum())
    with counting(), pytest.raises(RuntimeError, match="inside"):
        gradient(x)


def test_functions_kept_elsewhere_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("keeper")
    module.attention = kept = mx.fast.scaled_dot_product_attention
    monkeypatch.setitem(sys.modules, "keeper", module)
    before = mx.metal.is_available(), mx.default_device()
    with metal_graph():
        assert module.attention is mx.fast.scaled_dot_product_attention is not kept
        assert mx.metal.is_available()
        assert mx.default_device() == mx.gpu
    assert module.attention is mx.fast.scaled_dot_product_attention is kept
    assert (mx.metal.is_available(), mx.default_device()) == before


def test_a_metal_kernel_is_one_launch() -> None:
    (x,) = arrays((4, 8))

    def step() -> list[mx.array]:
        kernel: Any = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["y"], source="")
        outputs: list[mx.array] = kernel(
            inputs=[x, 3], output_shapes=[(4,)], output_dtypes=[mx.float16], grid=(4, 1, 1), threadgroup=(4, 1, 1)
        )
        return outputs

    with counting() as cost:
        (y,) = step()
        cost.add(y)
        assert (y.shape, y.dtype) == ((4,), mx.float16)
    assert fused(cost) == {"CustomKernel": 1}
    with counting(evaluate=True), pytest.raises(RuntimeError, match="not evaluated"):
        step()


def test_gated_delta_is_one_primitive_for_heads_of_128() -> None:
    def step(width: int) -> Cost:
        q, k = (zeros((1, 64, 2, width), F32) for _ in range(2))
        v, gate = zeros((1, 64, 4, width), F32), zeros((1, 64, 4), F32)
        with counting() as cost:
            loss = mx.value_and_grad(lambda *a: mx.fast.gated_delta_update(*a)[0].sum(), argnums=(0, 1, 2, 3, 4))
            cost.add(loss(q, k, v, gate, gate))
        return cost

    assert fused(step(128)) == {"GatedDeltaUpdate": 1, "GatedDeltaUpdateVJP": 1}
    assert not fused(step(64))
