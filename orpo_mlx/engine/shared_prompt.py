"""Run what prompts share with their completions once, and the rest of each row against it, on unmodified mlx-lm models.

mlx-lm's attention layers talk to a cache: they ask it for the position offset and the mask, hand it new keys and values
and attend over what it returns. These caches keep plain arrays, so gradients flow from the rows through the prefix's
keys and values. Recurrent layers keep a state instead, and each row goes on from it. All prefixes of a batch are of one
length and rows are padded at their right end alone, so every call is causal and no mask is ever needed but for windows.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache


class PrefixCache:
    """One attention layer's keys and values of B prefixes of `length` tokens."""

    def __init__(self, length: int) -> None:
        self.length, self.offset = length, 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep the prefix's keys and values, (B, heads, S, dim), and return them."""
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Causal mask of the prefix over itself."""
        return _mask(length, 0, return_array, window_size)

    def fresh(self, length: int) -> PrefixCache:
        """An empty one for prefixes of that many tokens."""
        return PrefixCache(length)

    def branch(self, rows: int) -> RowCache:
        """A cache for `rows` rows that continue each prefix; any number of caches may start from one prefix."""
        return RowCache(self, rows)


class RowCache:
    """One attention layer's view of rows that continue prefixes, as many for each: the prefix's keys and values before
    their own. The prefix is left as it is."""

    def __init__(self, prefix: PrefixCache, rows: int) -> None:
        self._prefix, self._rows, self.offset = prefix, rows, prefix.length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of prefix and row, joined: (B·rows, heads, S + W, dim) from (B·rows, heads, W, dim)."""
        assert self._prefix.keys is not None
        assert self._prefix.values is not None
        return _behind(self._prefix.keys, keys, self._rows), _behind(self._prefix.values, values, self._rows)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Causal mask of the row over prefix and row."""
        return _mask(length, self.offset, return_array, window_size)


class RecurrentPrefix(ArraysCache):
    """One recurrent layer's state after B prefixes."""

    def fresh(self, length: int) -> RecurrentPrefix:
        """An empty one for prefixes of any length."""
        return RecurrentPrefix(len(self.cache))

    def branch(self, rows: int) -> ArraysCache:
        """A cache for `rows` rows that go on from each state. The states are left as they are."""
        cache = ArraysCache(len(self.cache))
        cache.cache = [state if state is None or rows == 1 else mx.repeat(state, rows, axis=0) for state in self.cache]
        return cache


class PrefixList(CacheList):
    """The prefix caches of a layer that keeps several."""

    def fresh(self, length: int) -> PrefixList:
        """Empty ones for prefixes of that many tokens."""
        return PrefixList(*(cache.fresh(length) for cache in self.caches))

    def branch(self, rows: int) -> CacheList:
        """Those for rows."""
        return CacheList(*(cache.branch(rows) for cache in self.caches))


class PrefixCaches:
    """Makes a model's prefix caches: one a layer, fewer where layers share keys and values.

    Args:
        model: an mlx-lm model.
    """

    def __init__(self, model: Any) -> None:
        self._like: list[Any] = make_prompt_cache(model)

    @property
    def fit(self) -> bool:
        """Whether all that the model's layers keep is keys and values, or the state of a recurrence."""
        return all(map(_is_known, self._like))

    def __call__(self, length: int) -> list[Any]:
        """Caches for prefixes of that many tokens."""
        return [_prefix(cache, length) for cache in self._like]


def _is_known(cache: Any) -> bool:
    if isinstance(cache, CacheList):
        return all(map(_is_known, cache.caches))
    return isinstance(cache, (KVCache, RotatingKVCache, ArraysCache))


def _prefix(like: Any, length: int) -> Any:
    if isinstance(like, CacheList):
        return PrefixList(*(_prefix(cache, length) for cache in like.caches))
    return RecurrentPrefix(len(like.cache)) if isinstance(like, ArraysCache) else PrefixCache(length)


def _behind(prefix: mx.array, own: mx.array, rows: int) -> mx.array:
    if rows == 1:
        return mx.concatenate([prefix, own], axis=2)
    # Through a fifth axis, so that the prefix is written once into the result and never repeated by itself.
    batch, heads, length, width = prefix.shape
    before = mx.broadcast_to(prefix[:, None], (batch, rows, heads, length, width))
    joined = mx.concatenate([before, own.reshape(batch, rows, *own.shape[1:])], axis=3)
    return joined.reshape(batch * rows, heads, -1, width)


def _mask(length: int, offset: int, return_array: bool, window_size: int | None) -> mx.array | str | None:
    if not return_array and (window_size is None or offset + length <= window_size):
        return "causal" if length > 1 else None
    mask: mx.array = create_causal_mask(length, offset, window_size=window_size)
    return mask
