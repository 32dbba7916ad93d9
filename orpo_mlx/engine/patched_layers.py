"""What mlx-lm's layers call, exchanged for the length of a `with` block for the same functions at a lower price.

Attention goes to `attention.attention`; SwiGLU keeps nothing for the backward pass but its two arguments; a LoRA layer
adds its low-rank part inside of a matrix product, both ways, rather than in passes of their own over its output; the
gated delta rule runs in chunks. Layers that call none of them run as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations
from mlx_lm.tuner.lora import LoRALinear

from orpo_mlx.engine.attention import KEPT_BYTES, attention, fits, model_attention
from orpo_mlx.engine.equivalence import close
from orpo_mlx.engine.fast_exp import sigmoid
from orpo_mlx.engine.gated_delta import gated_delta_update, model_gated_delta_update


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gate · σ(gate) · up, elementwise; σ(gate) is computed again in the backward pass."""

    def forward(gate: mx.array, up: mx.array) -> mx.array:
        return gate * sigmoid(gate) * up

    function: Any = mx.custom_function(forward)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, mx.array]:
        gate, up = primals
        share = sigmoid(gate)
        slope = cotangent * share
        return slope * up * (1 + gate * (1 - share)), slope * gate

    result: mx.array = function(gate, up)
    return result


def lora_linear(layer: LoRALinear, x: mx.array) -> mx.array:
    """linear(x) + scale · (x A) B, and its gradients towards x, A and B; the linear layer itself is frozen.

    Both sums are made by the product that makes their last term (addmm), so no array of the output's or the input's
    size is written and read again for them. mlx-lm's own call is taken where LoRA dropout is on, or where A and B are
    not of x's dtype, since the low-rank part is then rounded before it is added.
    """
    linear, scale = layer.linear, layer.scale
    same = x.dtype == layer.lora_a.dtype == layer.lora_b.dtype
    if not same or layer.dropout(x) is not x or linear.trainable_parameters():
        plain: mx.array = model_lora_linear(layer, x)
        return plain

    def forward(x: mx.array, a: mx.array, b: mx.array) -> list[mx.array]:
        narrow = x @ a
        return [mx.addmm(linear(x), narrow, b, alpha=scale), narrow]

    function: Any = mx.custom_function(forward)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
        x, a, b = primals
        cotangent, narrow = cotangents[0], outputs[1]
        slope = cotangent @ b.T
        (through_linear,) = mx.vjp(linear, [x], [cotangent])[1]
        grad_x = mx.addmm(through_linear, slope, a.T, alpha=scale)
        return grad_x, scale * (_flat(x).T @ _flat(slope)), scale * (_flat(narrow).T @ _flat(cotangent))

    result: mx.array = function(x, layer.lora_a, layer.lora_b)[0]
    return result


def _flat(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


model_lora_linear = LoRALinear.__call__
"""mlx-lm's own, whatever stands in its place later."""


Function = Callable[..., Any]
Choice = Callable[[Function, Function], Function]
"""This package's function and mlx-lm's to what the layers call."""

_EXCHANGED: dict[str, tuple[Function, Function]] = {
    "swiglu": (swiglu, activations.swiglu),
    "gated_delta_update": (gated_delta_update, model_gated_delta_update),
}
"""By the name that the layers' modules have for it: this package's function and mlx-lm's."""


def _ours(ours: Function, _: Function) -> Function:
    return ours


@contextmanager
def lean_layers(model: nn.Module, kept_bytes: int = KEPT_BYTES, choose: Choice = _ours) -> Iterator[None]:
    """Within the block, the layers of `model` call the functions of this package, `attention` with `kept_bytes`."""

    def patched_attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **rest: Any) -> Any:
        if fits(q, mask, rest):
            return attention(q, k, v, scale=scale, mask=mask, kept_bytes=kept_bytes)
        return model_attention(q, k, v, scale=scale, mask=mask, **rest)

    places: list[tuple[Any, str, Function, Function]] = [
        (mx.fast, "scaled_dot_product_attention", patched_attention, model_attention),
        (LoRALinear, "__call__", lora_linear, model_lora_linear),
    ]
    for module in _modules_of(model):
        for name, (ours, theirs) in _EXCHANGED.items():
            if getattr(module, name, None) is theirs:
                places.append((module, name, ours, theirs))
    before = [getattr(owner, name) for owner, name, _, _ in places]
    for owner, name, ours, theirs in places:
        setattr(owner, name, choose(ours, theirs))
    try:
        yield
    finally:
        for (owner, name, _, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def lean_agrees(model: nn.Module, run: Callable[[], Any], kept_bytes: int = KEPT_BYTES) -> bool:
    """Whether each function gives what mlx-lm's gives, up to rounding, on what it is called with in `run`.

    One by one, since in half precision the rounding of one layer is blown up by those that follow: whole models of 24
    layers differ by 10 % and more between two right ways to compute them.
    """
    agreed: list[bool] = []

    def both(ours: Function, theirs: Function) -> Function:
        def call(*arguments: Any, **options: Any) -> Any:
            found, expected = ours(*arguments, **options), theirs(*arguments, **options)
            several = isinstance(expected, tuple)
            agreed.extend(map(close, found, expected) if several else [close(found, expected)])
            return expected

        return call

    with lean_layers(model, kept_bytes, both):
        mx.eval(run())
    return all(agreed)


def _modules_of(model: nn.Module) -> list[Any]:
    """The Python modules that define the model's layers."""
    names = {type(layer).__module__ for _, layer in model.named_modules()}
    return [sys.modules[name] for name in names if name.startswith("mlx_lm.")]
