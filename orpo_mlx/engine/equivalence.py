"""Probes that show whether a cheaper path gives what the plain forward gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from orpo_mlx.device_profile import RowLayout
from orpo_mlx.types import TokenizedPair

_PROBE_TOLERANCE = 1e-3


_MOST_ROUNDING = 0.25
"""Of how much a channel differs between tokens."""


def probe_pairs(layout: RowLayout) -> list[TokenizedPair]:
    """Two pairs of a few tokens that mean something, whose prompts are long enough to be shared in part.

    Every sequence is longer than 8 tokens: up to there MLX takes other attention kernels than training meets.
    """
    ids = (1, 2, 3, 4, 2, 1) * (layout.multiple + 4)
    shorter, longer = layout.multiple + 9, layout.multiple + 13
    return [
        TokenizedPair(ids[:shorter], (3, 1, 2) * 3, (2, 2, 1) * 4),
        TokenizedPair(ids[:longer], (4, 1, 1) * 4, (3, 2, 4) * 3),
    ]


def same_states(found: mx.array, expected: mx.array) -> bool:
    """Whether two ways to compute the states (N, H) of N tokens agree up to rounding.

    In float32 to 1e-3 of the largest. In half precision the rounding of a layer is blown up by those that follow, and a
    few channels may be so much larger than all others that they hide what is wrong in those; there it goes by how far
    the channels are off, beside how much each differs between tokens.
    """
    if expected.dtype == mx.float32:
        return close(found, expected)
    return error_between_tokens(found, expected) < _MOST_ROUNDING


def error_between_tokens(found: mx.array, expected: mx.array) -> float:
    """The median over channels of rms(found - expected) / rms(expected - its mean), both (N, H), over N tokens."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    spread = mx.sqrt((expected - expected.mean(axis=0)).square().mean(axis=0))
    error = mx.sqrt((found - expected).square().mean(axis=0))
    return float(np.array(mx.median(error / mx.maximum(spread, 1e-12))))


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model in training mode but for its dropout, for the length of a `with` block.

    In evaluation mode some layers run kernels on Metal that have no gradient.
    """
    was_training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)):
            module.eval()
    try:
        yield
    finally:
        model.train(was_training)


def close(found: mx.array, expected: mx.array) -> bool:
    """Equal up to rounding, relative to the largest value; half precision rounds more than float32."""
    found, wanted = found.astype(mx.float32), expected.astype(mx.float32)
    tolerance = _PROBE_TOLERANCE if expected.dtype == mx.float32 else 50 * _PROBE_TOLERANCE
    if found.shape != wanted.shape:
        return False
    return bool((mx.abs(found - wanted).max() <= tolerance * mx.abs(wanted).max()).item())


def reason_of(error: Exception) -> str:
    """What an error says, as a clause."""
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
