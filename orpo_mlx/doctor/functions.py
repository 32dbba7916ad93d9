"""Every function that the package puts in the place of mlx-lm's: value and gradients against its formula on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import activations, llama
from mlx_lm.models import gated_delta as model_gated_delta
from mlx_lm.tuner.lora import LoRALinear

from orpo_mlx.doctor.findings import Finding, Sizes, on_a_cpu, random_arrays, relative_error, seconds, tolerance
from orpo_mlx.doctor.package import (
    find_head,
    frozen_head_logps,
    functions_in_place,
    learning_head_logps,
    make_model,
    recurrent_model,
)

GROUP = "functions"
_LORA_CALL = LoRALinear.__call__
"""mlx-lm's own; within `functions_in_place` the class has another."""


class Function(NamedTuple):
    """A function, and what it must give."""

    name: str
    replaces: bool
    """Whether it is the package's on this device; False: mlx-lm's own is kept."""
    shapes: tuple[tuple[int, ...], ...]
    """Of its arguments, all of which have a gradient."""
    ours: Callable[..., mx.array]
    plain: Callable[..., mx.array]
    """The same by its formula, for float32 arguments."""
    kept_float32: int = 0
    """So many arguments at the end are float32 whatever the others are."""


NAMES = ("swiglu", "lora", "lora on 4 bits", "head", "trained head", "gated delta")


def check_function(name: str, dtype: str, sizes: Sizes) -> Iterator[Finding]:
    """One of `NAMES` on the device with inputs of `dtype`, against float32 on a CPU stream."""
    allowed = tolerance(dtype)
    with functions_in_place():
        function = _MAKERS[name](sizes.tokens, dtype)
        arguments = _arguments(function, dtype)
        weights = random_arrays([function.ours(*arguments).shape], "float32", seed=1)[0]
        found = [function.ours(*arguments), *gradients(function.ours, arguments, weights)]
        mx.eval(found)
        taken = seconds(lambda: gradients(function.ours, arguments, weights), 2, warm_up=False)
    with on_a_cpu():
        exact = [each.astype(mx.float32) for each in arguments]
        expected = [function.plain(*exact), *gradients(function.plain, exact, weights)]
        mx.eval(expected)
    errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
    passed = max(errors) <= allowed
    sentence = f"relative error {max(errors):.1e}, allowed {allowed:.0e}"
    figures = {"replaced": function.replaces, "error": max(errors), "tolerance": allowed, "microseconds": 1e6 * taken}
    yield Finding(GROUP, f"{name}, {dtype}", passed, sentence, figures)


def gradients(
    function: Callable[..., mx.array], arguments: Sequence[mx.array], weights: mx.array
) -> tuple[mx.array, ...]:
    """Gradients of Σ weights · function(arguments) towards all arguments."""

    def total(*arguments: mx.array) -> mx.array:
        return (function(*arguments).astype(mx.float32) * weights).sum()

    found: tuple[mx.array, ...] = mx.grad(total, argnums=tuple(range(len(arguments))))(*arguments)
    return found


def _arguments(function: Function, dtype: str) -> list[mx.array]:
    first = len(function.shapes) - function.kept_float32
    arguments = random_arrays(function.shapes, "float32")
    return [each.astype(getattr(mx, dtype)) if n < first else each for n, each in enumerate(arguments)]


def _swiglu(tokens: int, dtype: str) -> Function:
    module: Any = llama
    swiglu = module.swiglu
    shapes = ((1, tokens, 512),) * 2
    return Function(
        "swiglu", swiglu is not activations.swiglu, shapes, swiglu, lambda gate, up: gate * mx.sigmoid(gate) * up
    )


def _lora(tokens: int, dtype: str, *, quantised: bool = False) -> Function:
    linear = nn.Linear(256, 384, bias=False)
    linear.weight = random_arrays([(384, 256)], "float32", seed=3)[0] / 16
    linear.set_dtype(getattr(mx, dtype))
    base: Any = linear.to_quantized(64, 4) if quantised else linear
    base.freeze()
    weight = mx.dequantize(base.weight, base.scales, base.biases, 64, 4) if quantised else linear.weight
    weight = weight.astype(mx.float32)
    layer: Any = LoRALinear.from_base(base, r=8, scale=0.5)

    def ours(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        layer.lora_a, layer.lora_b = a, b
        output: mx.array = layer(x)
        return output

    def plain(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return x @ weight.T + 0.5 * ((x @ a) @ b)

    shapes = ((1, tokens, 256), (256, 8), (8, 384))
    return Function("lora", LoRALinear.__call__ is not _LORA_CALL, shapes, ours, plain, kept_float32=2)


def _heads(tokens: int, dtype: str, *, trained: bool = False) -> Function:
    model: Any = make_model("tiny, large vocabulary", dtype)
    head, embedding = find_head(model), model.model.embed_tokens
    width, vocabulary = model.args.hidden_size, model.args.vocab_size
    targets = mx.array(np.random.default_rng(5).integers(0, vocabulary, tokens).astype(np.int32))
    own, exact = embedding.weight, embedding.weight.astype(mx.float32)

    def plain(hidden: mx.array, weight: mx.array = exact) -> mx.array:
        logits = hidden @ weight.T
        return mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)

    def learning(hidden: mx.array, weight: mx.array) -> mx.array:
        embedding.weight = weight
        embedding.unfreeze()
        try:
            return learning_head_logps(head, hidden, targets)
        finally:
            embedding.weight = own
            embedding.freeze()

    if trained:
        return Function("trained head", True, ((tokens, width), (vocabulary, width)), learning, plain)
    return Function("head", True, ((tokens, width),), lambda x: frozen_head_logps(head, x, targets), plain)


def _gated_delta(tokens: int, dtype: str) -> Function:
    module: Any = sys.modules[type(recurrent_model().layers[0]).__module__]
    update: Any = module.gated_delta_update
    heads, width = 2, 128
    tokens = min(tokens, 512)  # Token by token, the reference keeps a state for each.
    zeros = mx.zeros((heads,), mx.float32)

    def prepared(q: mx.array, k: mx.array) -> list[mx.array]:
        # Of length 1, as the layer has them: the recurrence grows without bound where keys are long.
        return [each * mx.rsqrt(each.square().sum(axis=-1, keepdims=True) + 1e-6) for each in (q, k)]

    def ours(q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array) -> mx.array:
        # As the layer calls it in training mode: the kernel that it takes elsewhere has no gradient on Metal.
        output: mx.array = update(*prepared(q, k), v, a, b, zeros, zeros, use_kernel=False)[0]
        return output

    def plain(q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array) -> mx.array:
        decay = mx.exp(-nn.softplus(a))
        q, k = prepared(q, k)
        output: mx.array = model_gated_delta.gated_delta_ops(q, k, v, decay, mx.sigmoid(b))[0]
        return output

    shapes = (*[(1, tokens, heads, width)] * 3, (1, tokens, heads), (1, tokens, heads))
    return Function("gated delta", update is not model_gated_delta.gated_delta_update, shapes, ours, plain)


_MAKERS: dict[str, Callable[[int, str], Function]] = {
    "swiglu": _swiglu,
    "lora": _lora,
    "lora on 4 bits": lambda tokens, dtype: _lora(tokens, dtype, quantised=True),
    "head": _heads,
    "trained head": lambda tokens, dtype: _heads(tokens, dtype, trained=True),
    "gated delta": _gated_delta,
}
