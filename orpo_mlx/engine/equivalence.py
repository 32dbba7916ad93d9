"""Probes that show whether a cheaper path gives what the plain forward gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from orpo_mlx.data.batching import collate
from orpo_mlx.types import Batch, States, TokenizedPair

_PROBE_TOLERANCE = 1e-3


PROBE_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError, NotImplementedError)

_HALF_TOLERANCE, _MOST_ROUNDING = 0.05, 0.25
"""Of how much a channel differs between tokens."""


def probe_batch(*, padded: bool) -> Batch:
    """A pair of a few tokens, or two with much padding before the second prompt, of ids that mean something."""
    first = TokenizedPair((1, 2, 3, 4), (3, 1, 2), (2, 2, 1))
    pairs = [first] if not padded else [first._replace(prompt_ids=(1, 2, 3, 4) * 6), TokenizedPair((5, 6), (3,), (2,))]
    batch = collate(pairs)
    return batch._replace(prompt_ids=mx.where(batch.prompt_mask, batch.prompt_ids, 3))


def same_states(found: States, expected: States, batch: Batch) -> bool:
    """Whether two ways to compute states agree up to rounding, in each row of a batch.

    In float32 to 1e-3 of the largest. In half precision the rounding of a layer is blown up by those that follow, and a
    few channels may be so much larger than all others that they hide what is wrong in those; there the first row says
    how much rounding does in this model on this device, and the others may be off by twice that and 5 % more.
    """
    rounding = 0.0
    for row, sides in enumerate(zip(_row_states(found, batch), _row_states(expected, batch), strict=True)):
        if sides[1].dtype == mx.float32:
            same = close(*sides)
        else:
            error = error_between_tokens(*sides)
            same = error < (_HALF_TOLERANCE + 2 * rounding if row else _MOST_ROUNDING)
            rounding = max(rounding, error)
        if not same:
            return False
    return True


def _row_states(states: States, batch: Batch) -> Iterator[mx.array]:
    """Of each row, the states (N, H) of its tokens; those of padding mean nothing."""
    masks = [np.array(mask) for mask in (batch.prompt_mask, batch.chosen_mask, batch.rejected_mask)]
    for row in range(masks[0].shape[0]):
        places = [mx.array(np.flatnonzero(mask[row])) for mask in masks]
        yield mx.concatenate([part[row][place] for part, place in zip(states, places, strict=True)])


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
