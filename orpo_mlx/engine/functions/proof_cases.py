"""What each of this package's functions is compared on, given one call of it by a model's layers.

On random numbers of the call's shapes rather than its own, since in those a few huge channels would hide what is wrong
in the others, and since a new LoRA layer's B is 0, so that half of the layer has no effect; long enough to reach the
second block, tile or chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.tuner.lora import LoRALinear

from orpo_mlx.device_profile import DeviceProfile
from orpo_mlx.engine.functions.attention import fits, is_fused
from orpo_mlx.engine.functions.gated_delta import CHUNK, has_kernel
from orpo_mlx.engine.functions.patched_layers import (
    ATTENTION,
    GATED_DELTA,
    LORA,
    SWIGLU,
    Function,
    exchanges,
    joins_lora,
)
from orpo_mlx.engine.head_logps import head_logps, token_logps, trained_head_logps
from orpo_mlx.engine.lm_head import ModelHead, Rows

# More than 8: up to there MLX takes other kernels of attention than training meets.
_TOKENS, _EARLIER = 12, 4
_WINDOW = 7
_HEAD_TOKENS = 4096
# More than the rows of a trained head's smallest chunk: it is proven in two, the second one short.
_CHUNK_ROWS = 20
# Gradients of more numbers than this, as of a trained embedding, are sums of the others' parts, and take their time.
_MOST_NUMBERS = 1 << 22

Case = tuple[Function, Function, list[mx.array]]
"""Ours, theirs, and what both are called with."""


def attention_cases(
    profile: DeviceProfile, kept_bytes: int, q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **options: Any
) -> Iterator[Case]:
    random = RandomNumbers()
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


def swiglu_cases(profile: DeviceProfile, _: int, gate: mx.array, up: mx.array) -> Iterator[Case]:
    random = RandomNumbers()
    ours, theirs = exchanges(profile)[SWIGLU]
    yield _in_list(ours), _in_list(theirs), [random(each, (1, _TOKENS, each.shape[-1])) for each in (gate, up)]


def lora_cases(profile: DeviceProfile, _: int, layer: LoRALinear, x: mx.array) -> Iterator[Case]:
    if not joins_lora(layer, x, profile):
        return
    random = RandomNumbers()
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


def gated_delta_cases(
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
    random = RandomNumbers()
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


CASES: dict[str, Callable[..., Iterator[Case]]] = {
    ATTENTION: attention_cases,
    SWIGLU: swiglu_cases,
    LORA: lora_cases,
    GATED_DELTA: gated_delta_cases,
}
"""Of a profile, the bytes of kept attention weights, and a layer's call: the comparisons that prove its function."""


class FirstTokens(ModelHead):
    """The head of a model for its first tokens, which takes a fraction of the whole one's time.

    That it gives the logits of those tokens has been proven by `find_head`.
    """

    def __init__(self, head: ModelHead, vocabulary: int) -> None:
        super().__init__(head.model, head.backbone_name, head.vocabulary, tiles=head.tiles)
        self._whole, self.vocabulary = head, vocabulary

    def __call__(self, hidden: mx.array, rows: Rows | None = None) -> mx.array:
        return self._whole(hidden, slice(0, self.vocabulary) if rows is None else rows)


def head_cases(head: ModelHead, states: mx.array, profile: DeviceProfile) -> Iterator[Case]:
    some = FirstTokens(head, min(_HEAD_TOKENS, head.vocabulary)) if head.tiles else head
    hidden, targets = predictions(some, states, _TOKENS)
    # Several tiles of both rows and tokens.
    small = profile._replace(
        head_tile_rows=_TOKENS // 2 + 1, head_tile_tokens=some.vocabulary // 2 + 1, head_chunk_mib=0
    )
    yield (
        lambda hidden: [head_logps(some, hidden, targets, profile=small)],
        lambda hidden: [token_logps(some(hidden), targets)],
        [hidden],
    )
    if not head.is_frozen:
        yield trained_head_case(head, states, small)


def trained_head_case(head: ModelHead, states: mx.array, profile: DeviceProfile) -> Case:
    hidden, targets = predictions(head, states, _CHUNK_ROWS)
    own = {name: value for name, value in head.trained.items() if value.size <= _MOST_NUMBERS}
    random = RandomNumbers()

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


def predictions(head: ModelHead, states: mx.array, rows: int) -> tuple[mx.array, mx.array]:
    """Random states (rows, H), and tokens to be predicted from them."""
    targets = mx.random.randint(0, head.vocabulary, (rows,), key=mx.random.key(0))
    return RandomNumbers()(states, (rows, states.shape[-1])), targets


class RandomNumbers:
    """Normal numbers, the same each time, that leave MLX's random state alone."""

    def __init__(self) -> None:
        self._drawn = 0

    def __call__(self, like: mx.array, shape: Sequence[int]) -> mx.array:
        """Of the dtype of `like`."""
        self._drawn += 1
        return mx.random.normal(shape, like.dtype, key=mx.random.key(self._drawn))


def _in_list(function: Function, **options: Any) -> Function:
    return lambda *arrays: [function(*arrays, **options)]
