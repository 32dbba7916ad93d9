"""Proof, when a model is loaded, that this package's functions give what mlx-lm's give, gradients included.

The model is traced once on a few tokens, which shows what its layers call, with which shapes and dtypes. Each function
is then compared by itself, with native autodiff of the one it stands in for, on random numbers of those shapes. One by
one, since in half precision the rounding of a layer is blown up by those that follow: whole models of 24 layers differ
by 10 % and more between two right ways to compute them. On random numbers, since in a model's own a few huge channels
would hide what is wrong in the others; and since a new LoRA layer's B is 0, so that half of it has no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_causal_mask
from mlx_lm.tuner.lora import LoRALinear

from orpo_mlx.device_profile import DeviceProfile
from orpo_mlx.engine.attention import KEPT_BYTES, fits, is_fused
from orpo_mlx.engine.equivalence import disagreement, without_dropout
from orpo_mlx.engine.gated_delta import CHUNK, has_kernel
from orpo_mlx.engine.head_logps import head_logps, token_logps, trained_head_logps
from orpo_mlx.engine.lm_head import ModelHead, Rows
from orpo_mlx.engine.patched_layers import (
    ATTENTION,
    GATED_DELTA,
    LORA,
    SWIGLU,
    Function,
    exchanged,
    exchanges,
    joins_lora,
)
from orpo_mlx.errors import reason_of

HEAD = "head"
_TITLES = {ATTENTION: "Attention", SWIGLU: "SwiGLU", LORA: "LoRA", GATED_DELTA: "The gated delta rule"}
# More than 8: up to there MLX takes other kernels of attention than training meets.
_TOKENS, _EARLIER = 12, 4
_WINDOW = 7
_HEAD_TOKENS = 4096
# More than the rows of a trained head's smallest chunk.
_CHUNK_ROWS = 20
# Gradients of more numbers than this, as of a trained embedding, are sums of the others' parts, and take their time.
_MOST_NUMBERS = 1 << 22

Case = tuple[Function, Function, list[mx.array]]
"""Ours, theirs, and what both are called with."""


class Proofs(NamedTuple):
    """What was proven of a model's functions."""

    enabled: frozenset[str]
    """Names of the functions that agree: those of `patched_layers`, and "head"."""
    notes: tuple[str, ...]
    """A sentence for the user about each that does not."""


class Call(NamedTuple):
    """One call of a function by a layer."""

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def prove_functions(
    model: nn.Module,
    run: Callable[[], mx.array],
    profile: DeviceProfile,
    kept_bytes: int = KEPT_BYTES,
    head: ModelHead | None = None,
) -> Proofs:
    """Which of this package's functions the model's layers may call, and whether its head may run in tiles.

    A function that disagrees with mlx-lm's, or raises anything, is left out with a note. One that the model does not
    call is left out without.

    Args:
        model: an mlx-lm model with its adapters.
        run: calls its layers on a few tokens and returns the states (N, H) that its head is given; neither need be
            evaluated.
        profile: of the device.
        kept_bytes: see `attention`.
        head: the model's head, where it could be told apart.
    """
    with without_dropout(model):
        try:
            calls, states = _recorded(model, run, profile)
        except Exception as error:
            return Proofs(frozenset(), (f"All functions run as mlx-lm wrote them: {_raised(error)}.",))
        reasons: dict[str, str | None] = {}
        for call in calls:
            why_not = _why_not(partial(_MAKERS[call.name], profile, kept_bytes, *call.arguments, **call.options))
            reasons[call.name] = reasons.get(call.name) or why_not
        notes = [f"{_TITLES[name]} runs as mlx-lm wrote it: {why}." for name, why in reasons.items() if why]
        if head is not None:
            reasons[HEAD] = _why_not(partial(_head_cases, head, states, profile))
            if reasons[HEAD]:
                notes.append(f"The head makes all logits at one time: {reasons[HEAD]}.")
    return Proofs(frozenset(name for name, why in reasons.items() if why is None), tuple(notes))


def _why_not(cases: Callable[[], Iterator[Case]]) -> str | None:
    """Why a function cannot be taken, in a clause; None where it agrees in all cases."""
    try:
        return next(filter(None, (disagreement(*case) for case in cases())), None)
    except Exception as error:
        return _raised(error)


def _raised(error: Exception) -> str:
    return f"{type(error).__name__} is raised here ({reason_of(error)})"


def _recorded(model: nn.Module, run: Callable[[], mx.array], profile: DeviceProfile) -> tuple[list[Call], mx.array]:
    """One call of each kind, and what `run` returned."""
    calls: dict[Any, Call] = {}

    def recording(name: str, theirs: Function) -> Function:
        def record(*arguments: Any, **options: Any) -> Any:
            call = Call(name, arguments, options)
            calls.setdefault((name, *_KINDS[name](*arguments, **options)), call)
            return theirs(*arguments, **options)

        return record

    functions = {name: recording(name, each.theirs) for name, each in exchanges(profile).items()}
    with exchanged(model, functions):
        states = run()
    return list(calls.values()), states


def _attention_kind(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **_: Any) -> tuple[Any, ...]:
    seen = (mask.ndim, mask.dtype) if isinstance(mask, mx.array) else mask
    return q.shape[1], q.dtype, k.shape[1], k.dtype, v.shape[-1], v.dtype, q.shape[-1], seen


def _lora_kind(layer: LoRALinear, x: mx.array) -> tuple[Any, ...]:
    parameters: dict[str, mx.array] = dict(tree_flatten(layer.parameters()))
    shapes = tuple((name, each.shape, each.dtype) for name, each in sorted(parameters.items()))
    return type(layer.linear), shapes, x.dtype


def _gated_delta_kind(q: mx.array, k: mx.array, v: mx.array, a: mx.array, *_: Any, **__: Any) -> tuple[Any, ...]:
    return k.shape[2:], v.shape[2:], a.shape[2:], q.dtype


_KINDS: dict[str, Callable[..., tuple[Any, ...]]] = {
    ATTENTION: _attention_kind,
    SWIGLU: lambda gate, up: (gate.shape[-1], gate.dtype, up.dtype),
    LORA: _lora_kind,
    GATED_DELTA: _gated_delta_kind,
}
"""What tells calls of a function apart, beside the number of rows and tokens."""


def _attention_cases(
    profile: DeviceProfile, kept_bytes: int, q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **options: Any
) -> Iterator[Case]:
    random = _Random()
    keys = _TOKENS + _EARLIER
    primals = [
        random(like, (1, like.shape[1], length, like.shape[-1]))
        for like, length in ((q, _TOKENS), (k, keys), (v, keys))
    ]
    # Longer sequences than the probe's meet the edge of a sliding window.
    seen = create_causal_mask(_TOKENS, _EARLIER, window_size=_WINDOW)
    if isinstance(mask, mx.array):
        seen = seen.reshape(*[1] * (mask.ndim - 2), *seen.shape)
        seen = seen if mask.dtype == mx.bool_ else mx.where(seen, random(mask, seen.shape), -mx.inf).astype(mask.dtype)
    # Several blocks, with what is kept of them and without.
    small = profile._replace(attention_rows=_TOKENS // 2 - 1, attention_block_mib=0)
    sizes = (kept_bytes, 0) if profile.kept_attention and kept_bytes else (0,)
    for each in [seen] if isinstance(mask, mx.array) else [mask, seen]:
        if is_fused(primals[0], v, each, profile) or not fits(primals[0], each, _settings(options)):
            continue
        for size in sizes:
            ours, theirs = exchanges(small, size)[ATTENTION]
            yield _in_list(ours, mask=each, **options), _in_list(theirs, mask=each, **options), primals


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "scale"}


def _swiglu_cases(profile: DeviceProfile, _: int, gate: mx.array, up: mx.array) -> Iterator[Case]:
    random = _Random()
    ours, theirs = exchanges(profile)[SWIGLU]
    yield _in_list(ours), _in_list(theirs), [random(each, (1, _TOKENS, each.shape[-1])) for each in (gate, up)]


def _lora_cases(profile: DeviceProfile, _: int, layer: LoRALinear, x: mx.array) -> Iterator[Case]:
    if not joins_lora(layer, x, profile):
        return
    random = _Random()
    (width, rank), own = layer.lora_a.shape, (layer.lora_a, layer.lora_b)
    # Both parts of the output of a size, whatever the layer's scale.
    factors = (
        random(own[0], own[0].shape) * width**-0.5,
        random(own[1], own[1].shape) * (rank**-0.5 / (abs(layer.scale) or 1.0)),
    )

    def with_factors(function: Function) -> Function:
        def call(x: mx.array, a: mx.array, b: mx.array) -> list[mx.array]:
            layer.lora_a, layer.lora_b = a, b
            try:
                return [function(layer, x)]
            finally:
                layer.lora_a, layer.lora_b = own

        return call

    ours, theirs = exchanges(profile)[LORA]
    yield with_factors(ours), with_factors(theirs), [random(x, (1, _TOKENS, x.shape[-1])), *factors]


def _gated_delta_cases(
    profile: DeviceProfile,
    _: int,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,  # noqa: N803
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    **options: Any,
) -> Iterator[Case]:
    if a.ndim != 3:
        return
    random = _Random()
    # mlx-lm's keeps several states a token. One key head and its value heads say all, but to a kernel for so many
    # heads; the tokens reach beyond a chunk's end where there are chunks.
    native = profile.native_gated_delta and has_kernel(k, v)
    keys, length = (k.shape[2], 2 * _TOKENS) if native else (1, CHUNK + _TOKENS)
    values = v.shape[2] // k.shape[2] * keys
    unit = [
        each / mx.linalg.norm(each, axis=-1, keepdims=True)
        for each in (random(q, (1, length, keys, q.shape[-1])), random(k, (1, length, keys, k.shape[-1])))
    ]
    gates = [random(each, (1, length, values)) for each in (a, b)]
    start = mx.zeros((1, values, v.shape[-1], k.shape[-1]))
    primals = [
        *unit,
        random(v, (1, length, values, v.shape[-1])),
        *gates,
        A_log[:values],
        dt_bias[:values],
        random(start, start.shape),
    ]
    options |= {"use_kernel": False, "mask": None if mask is None else mx.arange(length)[None] >= _EARLIER}
    ours, theirs = exchanges(profile)[GATED_DELTA]
    yield lambda *arrays: list(ours(*arrays, **options)), lambda *arrays: list(theirs(*arrays, **options)), primals


_MAKERS: dict[str, Callable[..., Iterator[Case]]] = {
    ATTENTION: _attention_cases,
    SWIGLU: _swiglu_cases,
    LORA: _lora_cases,
    GATED_DELTA: _gated_delta_cases,
}


class _FirstTokens(ModelHead):
    """The head of a model for its first tokens, whose sweep takes a fraction of the whole one's time."""

    def __init__(self, head: ModelHead, vocabulary: int) -> None:
        super().__init__(head.model, head.backbone_name, head.vocabulary, tiles=head.tiles)
        self._whole, self.vocabulary = head, vocabulary

    def __call__(self, hidden: mx.array, rows: Rows | None = None) -> mx.array:
        return self._whole(hidden, slice(0, self.vocabulary) if rows is None else rows)


def _head_cases(head: ModelHead, states: mx.array, profile: DeviceProfile) -> Iterator[Case]:
    some = _FirstTokens(head, min(_HEAD_TOKENS, head.vocabulary)) if head.tiles else head
    hidden, targets = _predictions(some, states, _TOKENS)
    # Several tiles of both rows and tokens.
    small = profile._replace(
        head_tile_rows=_TOKENS // 2 + 1, head_tile_tokens=some.vocabulary // 2 + 1, head_chunk_mib=0
    )
    yield (
        lambda hidden: [head_logps(some, hidden, targets, profile=small)],
        lambda hidden: [token_logps(head(hidden)[..., : some.vocabulary], targets)],
        [hidden],
    )
    if not head.is_frozen:
        yield _trained_head_case(head, states, small)


def _trained_head_case(head: ModelHead, states: mx.array, profile: DeviceProfile) -> Case:
    hidden, targets = _predictions(head, states, _CHUNK_ROWS)
    own = {name: value for name, value in head.trained.items() if value.size <= _MOST_NUMBERS}
    random = _Random()

    def with_parameters(function: Callable[[mx.array], mx.array]) -> Function:
        def call(hidden: mx.array, *parameters: mx.array) -> list[mx.array]:
            head.update(dict(zip(own, parameters, strict=True)))
            try:
                return [function(hidden)]
            finally:
                head.update(own)

        return call

    drawn = [random(value, value.shape) * 0.1 if name.endswith("lora_b") else value for name, value in own.items()]
    return (
        with_parameters(lambda hidden: trained_head_logps(head, hidden, targets, profile=profile)),
        with_parameters(lambda hidden: token_logps(head(hidden), targets)),
        [hidden, *drawn],
    )


def _predictions(head: ModelHead, states: mx.array, rows: int) -> tuple[mx.array, mx.array]:
    """Random states (rows, H), and tokens to be predicted from them."""
    targets = mx.random.randint(0, head.vocabulary, (rows,), key=mx.random.key(0))
    return _Random()(states, (rows, states.shape[-1])), targets


class _Random:
    """Normal numbers, the same each time, that leave MLX's random state alone."""

    def __init__(self) -> None:
        self._drawn = 0

    def __call__(self, like: mx.array, shape: Sequence[int]) -> mx.array:
        """Of the dtype of `like`."""
        self._drawn += 1
        return mx.random.normal(shape, like.dtype, key=mx.random.key(self._drawn))


def _in_list(function: Function, **options: Any) -> Function:
    return lambda *arrays: [function(*arrays, **options)]
