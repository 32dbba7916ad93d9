"""Predictions for large quantised models on a CPU: products are not computed, and arrays are as large as theirs.

On a CPU a product with a 4-bit matrix takes minutes at the sizes of a real model. What a step takes of memory depends
on shapes and dtypes alone; `tests/promises/test_recipes.py` holds predictions with and without against each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx


@contextmanager
def cheap_products() -> Iterator[None]:
    """Within the block, a product with a quantised matrix is an array of its shape and dtype with other numbers."""
    library: Any = mx
    real = library.quantized_matmul
    library.quantized_matmul = _cheap_product
    try:
        yield
    finally:
        library.quantized_matmul = real


def _cheap_product(x: mx.array, w: mx.array, *_: Any, transpose: bool = True, bits: int = 4, **__: Any) -> mx.array:
    width = w.shape[0] if transpose else w.shape[-1] * 32 // bits
    function: Any = mx.custom_function(lambda x: _spread(x, width))
    function.vjp(lambda primals, cotangent, _: _spread(cotangent, primals.shape[-1]))
    product: mx.array = function(x)
    return product


def _spread(x: mx.array, width: int) -> mx.array:
    """An array of `width` columns that is as dear to hold as a product, and cheap to compute."""
    return mx.broadcast_to(x[..., :1], (*x.shape[:-1], width)) + mx.zeros((), x.dtype)
