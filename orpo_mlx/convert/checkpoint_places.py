"""Where a checkpoint holds a weight of mlx-lm's model, and in which form: to put a merged one back there.

mlx-lm renames, splits, transposes and stacks what it loads. A place is believed only where the base model's weight,
taken back the same way, is the very weight that stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx

from orpo_mlx.models.peft_names import STACKED, expert_names, stored_names

# Which half of a fused matrix of experts.
_HALVES = {"gate_proj": 0, "up_proj": 1}

Tensors = dict[str, mx.array]
Form = Callable[[mx.array], mx.array]


class _Place(NamedTuple):
    """A tensor of a checkpoint and how it follows from a weight of the model."""

    name: str
    form: Form
    half: int | None = None
    """Which half of the tensor, along `axis`; None for all of it."""
    axis: int = 0


def put_back(tensors: Tensors, name: str, before: mx.array, after: mx.array) -> bool:
    """Put the weight `after` in the place of `before`, `name` in the model; whether it has one among `tensors`."""
    module, _, leaf = name.rpartition(".")
    for stored in stored_names(module):
        for places in _candidates(f"{stored}.{leaf}", before):
            olds = list(before) if len(places) > 1 else [before]
            news = list(after) if len(places) > 1 else [after]
            if all(_holds(tensors, place, old) for place, old in zip(places, olds, strict=True)):
                for place, new in zip(places, news, strict=True):
                    tensors[place.name] = _with(tensors[place.name], place, place.form(new))
                return True
    return False


def _candidates(name: str, before: mx.array) -> Iterator[list[_Place]]:
    """Lists of places that a weight may be in: one tensor, or one for each expert."""
    layer, stacked, rest = name.partition(STACKED)
    if stacked:
        projection, _, leaf = rest.partition(".")
        for experts in expert_names(f"{layer}{stacked}{projection}", before.shape[0]):
            yield [_Place(f"{expert}.{leaf}", _same) for expert in experts]
        if projection in _HALVES:  # Granite's names.
            yield [_Place(f"{layer}.input_linear.{leaf}", _same, _HALVES[projection], 1)]
        yield [_Place(f"{layer}.output_linear.{leaf}", _same)]
    layer, fused, rest = (layer, ".experts.", rest) if stacked else name.partition(".experts.")
    projection = rest.removesuffix(".weight")
    # Either way round: which one it is, the base model's weight decides (`_holds`).
    for form, axis in ((_same, 1), (_transposed, 2)) if fused else ():
        if projection in _HALVES:
            yield [_Place(f"{layer}.experts.gate_up_proj", form, _HALVES[projection], axis)]
        yield [_Place(f"{layer}.experts.{projection}", form)]
    yield [_Place(name, _same)]
    if before.ndim == 1:
        yield [_Place(name, lambda weight: weight - 1)]  # Norms to which the model adds 1: stored without.
    if before.ndim == 3:
        yield [_Place(name, lambda weight: weight.moveaxis(2, 1))]  # Convolutions: MLX has channels last.


def _holds(tensors: Tensors, place: _Place, weight: mx.array) -> bool:
    """Whether this weight of the base model stands in that place."""
    stored = tensors.get(place.name)
    wanted = place.form(weight)
    if stored is None or stored.ndim != wanted.ndim:
        return False
    if place.half is not None:
        if stored.shape[place.axis] != 2 * wanted.shape[place.axis]:
            return False
        stored = mx.split(stored, 2, axis=place.axis)[place.half]
    if stored.shape != wanted.shape:
        return False
    # Adding 1 in half precision rounds: those that agree to the rounding are the same.
    exact = place.form in (_same, _transposed)
    stored = stored.astype(wanted.dtype)
    same = mx.array_equal(stored, wanted) if exact else mx.allclose(stored, wanted, rtol=0, atol=1e-2)
    return bool(same.item())


def _with(stored: mx.array, place: _Place, new: mx.array) -> mx.array:
    """The tensor with its part exchanged."""
    if place.half is None:
        return new
    halves = list(mx.split(stored, 2, axis=place.axis))
    # `concatenate` would otherwise promote the half that is kept.
    halves[place.half] = new.astype(stored.dtype)
    return mx.concatenate(halves, axis=place.axis)


def _same(weight: mx.array) -> mx.array:
    return weight


def _transposed(weight: mx.array) -> mx.array:
    return weight.swapaxes(1, 2)
