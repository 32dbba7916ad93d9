"""What mlx-lm's layers call, exchanged for the length of a `with` block for the same functions at a lower price.

Attention goes to `attention.attention`; SwiGLU keeps nothing for the backward pass but its two arguments, and its
sigmoid where that costs more to compute again than to keep. Layers that call neither run as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from orpo_mlx.attention import attention, fits, model_attention
from orpo_mlx.exponential import on_cpu, sigmoid


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gate · σ(gate) · up, elementwise; on a CPU, σ(gate) is kept for the backward pass."""
    keep = on_cpu()

    def forward(gate: mx.array, up: mx.array) -> list[mx.array]:
        share = sigmoid(gate)
        return [gate * share * up, *([share] if keep else [])]

    function: Any = mx.custom_function(forward)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        gate, up = primals
        share = outputs[1] if keep else sigmoid(gate)
        slope = cotangents[0] * share
        return slope * up * (1 + gate * (1 - share)), slope * gate

    result: mx.array = function(gate, up)[0]
    return result


@contextmanager
def lean_layers(model: nn.Module) -> Iterator[None]:
    """Within the block, the layers of `model` call the functions of this package."""

    def patched_attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **rest: Any) -> Any:
        if fits(q, mask, rest):
            return attention(q, k, v, scale=scale, mask=mask)
        return model_attention(q, k, v, scale=scale, mask=mask, **rest)

    fast: Any = mx.fast
    callers = [module for module in _modules_of(model) if getattr(module, "swiglu", None) is activations.swiglu]
    before = fast.scaled_dot_product_attention
    fast.scaled_dot_product_attention = patched_attention
    for module in callers:
        module.swiglu = swiglu
    try:
        yield
    finally:
        fast.scaled_dot_product_attention = before
        for module in callers:
            module.swiglu = activations.swiglu


def _modules_of(model: nn.Module) -> list[Any]:
    """The Python modules that define the model's layers."""
    names = {type(layer).__module__ for _, layer in model.named_modules()}
    return [sys.modules[name] for name in names if name.startswith("mlx_lm.")]
