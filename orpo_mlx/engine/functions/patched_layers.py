"""What mlx-lm's layers call, exchanged for the length of a `with` block for the same functions at a lower price.

Attention goes to `attention.attention` where MLX has no fused kernel for it; SwiGLU keeps nothing for the backward pass
but its two arguments; a LoRA layer adds its low-rank part inside of a matrix product, both ways, rather than in passes
of their own over its output; the gated delta rule runs in chunks. Layers that call none of them run as they are.
`proofs.prove_functions` says which of these give what mlx-lm's own give.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations
from mlx_lm.tuner.lora import LoRALinear

from orpo_mlx.device_profile import DeviceProfile
from orpo_mlx.engine.functions.attention import KEPT_BYTES, attention, fits, guarded_attention, is_fused
from orpo_mlx.engine.functions.dropout import has_dropout
from orpo_mlx.engine.functions.fast_exp import sigmoid
from orpo_mlx.engine.functions.gated_delta import gated_delta_update, model_gated_delta_update
from orpo_mlx.engine.kept_outputs import output

Function = Callable[..., Any]

ATTENTION, SWIGLU, LORA, GATED_DELTA = "attention", "swiglu", "lora", "gated_delta"

model_lora_linear = LoRALinear.__call__
"""mlx-lm's own, whatever stands in its place later."""


class Exchange(NamedTuple):
    """This package's function, and the one of mlx-lm or MLX that it stands in for."""

    ours: Function
    theirs: Function


def swiglu(gate: mx.array, up: mx.array, *, polynomial_exp: bool) -> mx.array:
    """gate · σ(gate) · up, elementwise; σ(gate) is computed again in the backward pass."""

    def forward(gate: mx.array, up: mx.array) -> mx.array:
        return gate * sigmoid(gate, polynomial=polynomial_exp) * up

    function: Any = mx.custom_function(forward)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, mx.array]:
        gate, up = primals
        share = sigmoid(gate, polynomial=polynomial_exp)
        gated = cotangent * share
        return gated * up * (1 + gate * (1 - share)), gated * gate

    result: mx.array = function(gate, up)
    return result


def lora_linear(layer: LoRALinear, x: mx.array) -> mx.array:
    """linear(x) + scale · (x A) B, and its gradients towards x, A and B; the linear layer itself is frozen.

    Both sums are made by the product that makes their last term (addmm), so no array of the output's or the input's
    size is written and read again for them. Where x is half precision and A and B are float32, their products are made
    in x's dtype, and the gradients come back in float32.
    """
    linear, scale = layer.linear, layer.scale

    def forward(x: mx.array, narrow: mx.array, _: mx.array, b: mx.array) -> mx.array:
        return output(x, lambda: mx.addmm(linear(x), narrow, b.astype(x.dtype), alpha=scale))

    function: Any = mx.custom_function(forward)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        x, narrow, *masters = primals
        a, b = (each.astype(x.dtype) for each in masters)
        grad_narrow = cotangent @ b.T
        (through_linear,) = mx.vjp(linear, [x], [cotangent])[1]
        grad_x = mx.addmm(through_linear, grad_narrow, a.T, alpha=scale)
        grad_a = summed_product(x, grad_narrow).astype(masters[0].dtype)
        grad_b = summed_product(narrow, cotangent).astype(masters[1].dtype)
        return grad_x, mx.zeros_like(narrow), scale * grad_a, scale * grad_b

    # x A is an argument, not an output: whoever looks at one output of a custom function has all of them computed, and
    # a layer that runs again may have no use for the others. The gradient through it is part of those of x and A.
    narrow = mx.stop_gradient(x @ layer.lora_a.astype(x.dtype))
    result: mx.array = function(x, narrow, layer.lora_a, layer.lora_b)
    return result


def summed_product(left: mx.array, right: mx.array) -> mx.array:
    """leftᵀ right, summed over all tokens."""
    if left.dtype == mx.float16:
        # Of small gradients float16 would keep a few bits.
        left, right = left.astype(mx.float32), right.astype(mx.float32)
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def joins_lora(layer: LoRALinear, x: mx.array, profile: DeviceProfile) -> bool:
    """Whether `lora_linear` takes a layer.

    Not where LoRA dropout is on, or the linear layer is trained; nor where A and B would have to be rounded on a device
    that gains nothing from it.
    """
    dtypes = {layer.lora_a.dtype, layer.lora_b.dtype}
    wide = x.dtype == mx.float32 or profile.half_products
    same = dtypes == {x.dtype} or (wide and dtypes <= {mx.float32, x.dtype})
    return same and not has_dropout(layer.dropout) and not layer.linear.trainable_parameters()


def exchanges(profile: DeviceProfile, kept_bytes: int = KEPT_BYTES) -> dict[str, Exchange]:
    """What layers call, by name. Each takes any call: those it is not made for go to mlx-lm's own.

    Args:
        profile: of the device.
        kept_bytes: see `attention`.
    """

    def any_attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **rest: Any) -> Any:
        if is_fused(q, v, mask, profile) or not fits(q, mask, rest):
            return guarded_attention(q, k, v, scale=scale, mask=mask, **rest)
        return attention(q, k, v, scale=scale, mask=mask, profile=profile, kept_bytes=kept_bytes)

    def any_lora(layer: LoRALinear, x: mx.array) -> mx.array:
        return (lora_linear if joins_lora(layer, x, profile) else model_lora_linear)(layer, x)

    return {
        ATTENTION: Exchange(any_attention, guarded_attention),
        SWIGLU: Exchange(partial(swiglu, polynomial_exp=profile.polynomial_exp), activations.swiglu),
        LORA: Exchange(any_lora, model_lora_linear),
        GATED_DELTA: Exchange(partial(gated_delta_update, profile=profile), model_gated_delta_update),
    }


def patched_layers(
    model: nn.Module, enabled: Collection[str], profile: DeviceProfile, kept_bytes: int = KEPT_BYTES
) -> AbstractContextManager[None]:
    """Within the block, the layers of `model` call this package's functions.

    Args:
        model: an mlx-lm model.
        enabled: names of those functions, as `prove_functions` gives them. With none, layers run as mlx-lm wrote them,
            but for kernels of attention that have no gradient (`guarded_attention`).
        profile: of the device.
        kept_bytes: see `attention`.
    """
    functions = {name: each.ours for name, each in exchanges(profile, kept_bytes).items() if name in enabled}
    return exchanged(model, {ATTENTION: guarded_attention, **functions})


@contextmanager
def exchanged(model: nn.Module, functions: Mapping[str, Function]) -> Iterator[None]:
    """Within the block, the layers of `model` call `functions`, by name, in place of mlx-lm's."""
    places = [(owner, attribute, functions[name]) for name, owner, attribute in call_places(model) if name in functions]
    before = [getattr(owner, attribute) for owner, attribute, _ in places]
    for owner, attribute, function in places:
        setattr(owner, attribute, function)
    try:
        yield
    finally:
        for (owner, attribute, _), function in zip(places, before, strict=True):
            setattr(owner, attribute, function)


def call_places(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """(name, module or class, attribute) from which the model's layers take the functions."""
    yield ATTENTION, mx.fast, "scaled_dot_product_attention"
    yield LORA, LoRALinear, "__call__"
    # mlx-lm's modules import these by name, so each has a reference of its own.
    own = {
        SWIGLU: ("swiglu", activations.swiglu),
        GATED_DELTA: ("gated_delta_update", model_gated_delta_update),
    }
    for module in {type(layer).__module__ for _, layer in model.named_modules()}:
        for name, (attribute, theirs) in own.items():
            if module.startswith("mlx_lm.") and getattr(sys.modules[module], attribute, None) is theirs:
                yield name, sys.modules[module], attribute
