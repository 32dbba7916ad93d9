"""Dropout that is drawn the same when layers run again, without the host waiting for a number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# Taken before anybody replaces it: `dropout_from` may be entered within itself.
_bernoulli = mx.random.bernoulli


def has_dropout(model: nn.Module) -> bool:
    """Whether some module of the model draws random numbers."""
    kinds = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)
    return any(isinstance(module, kinds) and module.training and module._p_1 < 1 for module in model.modules())


def dropout_keys(count: int) -> mx.array:
    """(count, 2) keys for `dropout_from`, drawn from MLX's random state."""
    # mx.random.seed wants a number of Python's, and the state itself cannot be set: neither can be traced.
    drawn = mx.random.randint(0, 1 << 31, (2,)).astype(mx.uint32)
    return mx.random.split(drawn, count)


@contextmanager
def dropout_from(key: mx.array | None) -> Iterator[None]:
    """Within the block, the masks of dropout layers depend on nothing but `key` and the order in which they are drawn.

    Args:
        key: one of `dropout_keys`, or None to leave them to MLX's random state.
    """
    if key is None:
        yield
        return
    number = itertools.count(1)

    def keyed(p: Any = 0.5, shape: Any = None, **_: Any) -> mx.array:
        return _bernoulli(p, shape, key=key + next(number))

    # Dropout layers look it up there each time they are called.
    random: Any = mx.random
    before, random.bernoulli = random.bernoulli, keyed
    try:
        yield
    finally:
        random.bernoulli = before
