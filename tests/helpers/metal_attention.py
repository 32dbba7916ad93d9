"""MLX 0.32.4's attention on Metal as far as it raises, so that a CPU can show which calls reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from orpo_mlx.engine.functions import attention

_WIDTHS = (64, 96, 128, 192, 256)


class NoLogSumExpError(RuntimeError):
    """What MLX raises."""


def raise_as_metal_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, MLX's attention under a gradient, for at most 8 queries and without an array mask, raises.

    Where a shape is taken by a vector kernel, a gradient asks it for a log-sum-exp, which it does not give.
    """
    inside: list[None] = []
    own = attention.model_attention

    def counted(transform: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(function: Any, *arguments: Any, **options: Any) -> Any:
            def traced(*primals: Any, **others: Any) -> Any:
                inside.append(None)
                try:
                    return function(*primals, **others)
                finally:
                    inside.pop()

            return transform(traced, *arguments, **options)

        return wrapped

    def metal(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any) -> mx.array:
        queries = q.shape[2]
        vector = queries <= min(8, k.shape[2]) and q.shape[1] // k.shape[1] * queries <= 32 and q.shape[-1] in _WIDTHS
        if inside and vector and not isinstance(mask, mx.array):
            raise NoLogSumExpError(f"the vector kernels do not produce a logsumexp, queries: {q.shape}")
        result: mx.array = own(q, k, v, scale=scale, mask=mask, **options)
        return result

    for name in ("vjp", "grad", "value_and_grad"):
        monkeypatch.setattr(mx, name, counted(getattr(mx, name)))
    monkeypatch.setattr(attention, "model_attention", metal)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", metal)
