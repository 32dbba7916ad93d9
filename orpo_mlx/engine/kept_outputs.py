"""Outputs of linear layers that a first pass over a model's layers keeps, so that a second one need not compute them.

A layer that runs again for its backward pass wants the outputs of its linear layers only as inputs of what follows
them. For each number of an output that is kept, as many products are saved as the linear layer has inputs: narrow
outputs of wide inputs save the most per byte. Which are kept is a figure of the device profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

Compute = Callable[[], mx.array]

_around: ContextVar[Callable[[mx.array, Compute], mx.array]] = ContextVar(
    "around", default=lambda _, compute: compute()
)


def output(x: mx.array, compute: Compute) -> mx.array:
    """A linear layer's output for x: what `compute` gives, or what was kept of an earlier call."""
    return _around.get()(x, compute)


@contextmanager
def keeping(kept: list[list[mx.array]], widest: float) -> Iterator[None]:
    """Append a list of the outputs, in order, of the linear layers that are called within the block.

    Left out are those of more than `widest` times their input's width, and the last: in a transformer's layer it is
    added to the states that leave it, and the gradient of a sum needs neither of its terms.
    """
    found: list[mx.array | None] = []

    def keep(x: mx.array, compute: Compute) -> mx.array:
        y = compute()
        found.append(y if _is_narrow(x, y, widest) else None)
        return y

    token = _around.set(keep)
    try:
        yield
    finally:
        _around.reset(token)
    kept.append([y for y in found[:-1] if y is not None])


@contextmanager
def taking(kept: Sequence[mx.array], widest: float) -> Iterator[None]:
    """The outputs that `keeping` found stand for those of the same calls, made again within the block."""
    given = iter(kept)

    def take(x: mx.array, compute: Compute) -> mx.array:
        # Its shape is known, and MLX computes nothing that nobody asks for.
        y = compute()
        return next(given, y) if _is_narrow(x, y, widest) else y

    token = _around.set(take)
    try:
        yield
    finally:
        _around.reset(token)


def _is_narrow(x: mx.array, y: mx.array, widest: float) -> bool:
    return y.shape[-1] <= widest * x.shape[-1]
