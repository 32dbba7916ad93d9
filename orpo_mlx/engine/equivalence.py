"""Whether a cheaper way gives what the plain one gives: the comparisons, and the probes they are made on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from orpo_mlx.device_profile import RowLayout
from orpo_mlx.types import TokenizedPair

Function = Callable[..., Sequence[mx.array]]
"""Arrays to arrays."""

# Two float32 forwards in another order of sums differ by far less, a mask or position wrong by one token by far more.
_PROBE_TOLERANCE = 1e-3
_FLOAT32_ERROR = 1e-4
# Several products follow one another in a function and its gradient.
_PRODUCTS = 10
# Rounding of half precision that is allowed at least, in its last place; twice mlx-lm's own error is allowed too.
_LAST_PLACES = 3
_LAST_PLACE = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-10}


# A mask or position that is wrong by one token is off by as much as channels differ between tokens, which is 1 here.
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


def close(found: mx.array, expected: mx.array, computed_in: mx.Dtype | None = None) -> bool:
    """Equal up to rounding, relative to the largest value; half precision rounds more than float32.

    `computed_in` is the dtype of the computation where that is not the arrays': float32 adapters of a bfloat16 model.
    """
    found, wanted = found.astype(mx.float32), expected.astype(mx.float32)
    tolerance = _PROBE_TOLERANCE if (computed_in or expected.dtype) == mx.float32 else 50 * _PROBE_TOLERANCE
    if found.shape != wanted.shape:
        return False
    return bool((mx.abs(found - wanted).max() <= tolerance * mx.abs(wanted).max()).item())


def disagreement(ours: Function, theirs: Function, primals: Sequence[mx.array]) -> str | None:
    """In what `ours` differs from `theirs`, in a clause; None where values and gradients agree up to rounding.

    Compared are the outputs and, for random cotangents, the gradients towards all `primals`, each by
    ‖found - expected‖ / ‖expected‖ (Euclidean norms over the whole array).

    In float32 they may be 1e-4 apart, or ten times what the device's float32 products are off: where it makes them in
    TF32, as the M5 does, that is more. In half precision both are measured against `theirs` in float32, on the same
    numbers, and ours may be off by twice what theirs is, or by three units in the last place.

    Args:
        ours: the function to be proven.
        theirs: the one it stands in for, with its native gradient.
        primals: what both are called with; float arrays.
    """
    cotangents = random_like(theirs(*primals))
    expected = value_and_gradients(theirs, primals, cotangents)
    found = value_and_gradients(ours, primals, cotangents)
    places = [_LAST_PLACE[array.dtype] for array in primals if array.dtype in _LAST_PLACE]
    if places:
        wide = [[array.astype(mx.float32) for array in arrays] for arrays in (primals, cotangents)]
        exact = value_and_gradients(theirs, *wide)
        floor = _LAST_PLACES * max(places)
        allowed = [mx.maximum(floor, 2 * relative_error(*pair)) for pair in zip(expected, exact, strict=True)]
    else:
        exact, floor = expected, max(_FLOAT32_ERROR, _PRODUCTS * product_error())
        allowed = [mx.array(floor)] * len(exact)
    errors = [relative_error(*pair) for pair in zip(found, exact, strict=True)]
    both = zip(np.array(mx.stack(errors)).tolist(), np.array(mx.stack(allowed)).tolist(), strict=True)
    for number, (error, most) in enumerate(both):
        what = "value" if number < len(cotangents) else "gradient"
        if found[number].dtype != expected[number].dtype:
            return f"its {what} is {found[number].dtype} instead of {expected[number].dtype}"
        # Not "error > most": that is false of NaN.
        if not error <= most:
            return f"its {what} is {_percent(error)} off here"
    return None


def relative_error(found: mx.array, expected: mx.array) -> mx.array:
    """‖found - expected‖ / ‖expected‖ in float32; 0 where both are 0."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    gap, size = (mx.sqrt(each.square().sum()) for each in (found - expected, expected))
    return mx.where(gap == 0, 0.0, gap / size)


@cache
def product_error() -> float:
    """How far a float32 product on the default device is from the same on the CPU: 0 there, some 1e-7 where both are
    float32, some 1e-4 where it is TF32."""
    left, right = (mx.random.normal((256, 256), key=mx.random.key(number)) for number in range(2))
    found = left @ right
    with mx.stream(mx.cpu):
        expected = left @ right
    return float(np.array(relative_error(found, expected)))


def value_and_gradients(
    function: Function, primals: Sequence[mx.array], cotangents: Sequence[mx.array]
) -> list[mx.array]:
    """The function's outputs and its gradients towards `primals`; cotangents are given in its outputs' dtypes."""
    outputs = function(*primals)
    given = [cotangent.astype(output.dtype) for cotangent, output in zip(cotangents, outputs, strict=True)]
    return [*outputs, *mx.vjp(function, list(primals), given)[1]]


def random_like(arrays: Sequence[mx.array]) -> list[mx.array]:
    keys = mx.random.split(mx.random.key(0), len(arrays))
    return [mx.random.normal(each.shape, each.dtype, key=keys[number]) for number, each in enumerate(arrays)]


def _percent(share: float) -> str:
    return "not finite or wholly" if not share < 10 else f"{100 * share:.2g} %"
