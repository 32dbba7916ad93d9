"""Run a prompt once and both completions against it, on unmodified mlx-lm models.

mlx-lm's attention layers talk to a cache: they ask it for the position offset and the mask, hand it new keys and values
and attend over what it returns. These caches keep plain arrays, so gradients flow from the completions through the
prompt's keys and values. Recurrent layers keep a state instead, and each completion goes on from it. Prompts are padded
on the left: each ends in the last column, its completion starts in the next, and sliding windows stay contiguous.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache


class PrefixCache:
    """One layer's keys and values of B prompts; `offset` is each row's position of column 0.

    Args:
        left_padding: (B,) padded columns of each row, or None where there are none.
        length: P, columns of the prompts.
    """

    def __init__(self, left_padding: mx.array | None, length: int) -> None:
        self.left_padding, self.length = left_padding, length
        self.offset: int | mx.array = 0 if left_padding is None else -left_padding
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep the prompt's keys and values, (B, heads, P, dim), and return them."""
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Causal mask of the prompt over itself."""
        return _mask(length, 0, self.left_padding, return_array, window_size)

    def branch(self) -> CompletionCache:
        """A cache for completions that continue these prompts; any number may start from one prefix."""
        return CompletionCache(self)


class CompletionCache:
    """One layer's view of a completion: the prompt's keys and values before its own. The prefix is left as it is."""

    def __init__(self, prefix: PrefixCache) -> None:
        self._prefix = prefix
        self.left_padding = prefix.left_padding
        self.offset = prefix.offset + prefix.length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Prompt and completion keys and values, joined."""
        assert self._prefix.keys is not None
        assert self._prefix.values is not None
        return mx.concatenate([self._prefix.keys, keys], axis=2), mx.concatenate([self._prefix.values, values], axis=2)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Causal mask of the completion over prompt and completion."""
        return _mask(length, self._prefix.length, self.left_padding, return_array, window_size)


class RecurrentPrefix(ArraysCache):
    """One recurrent layer's state after B prompts.

    Args:
        size: arrays that the layer keeps.
        left_padding: (B,) padded columns of each row, or None where there are none.
    """

    def __init__(self, size: int, left_padding: mx.array | None) -> None:
        super().__init__(size)
        # Each layer counts its own copy down.
        self.left_padding = None if left_padding is None else mx.array(left_padding)

    def branch(self) -> ArraysCache:
        """A cache for completions that go on from this state; any number may. The state is left as it is."""
        completion = ArraysCache(len(self.cache))
        completion.cache = list(self.cache)
        return completion


class PrefixList(CacheList):
    """The prefix caches of a layer that keeps several."""

    def branch(self) -> CacheList:
        """Those for completions."""
        return CacheList(*(cache.branch() for cache in self.caches))


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

    def __call__(self, left_padding: mx.array | None, length: int) -> list[Any]:
        """Caches for B prompts, padded on the left to `length` columns."""
        return [_prefix(cache, left_padding, length) for cache in self._like]


def _is_known(cache: Any) -> bool:
    if isinstance(cache, CacheList):
        return all(map(_is_known, cache.caches))
    return isinstance(cache, (KVCache, RotatingKVCache, ArraysCache))


def _prefix(like: Any, left_padding: mx.array | None, length: int) -> Any:
    if isinstance(like, CacheList):
        return PrefixList(*(_prefix(cache, left_padding, length) for cache in like.caches))
    if isinstance(like, ArraysCache):
        return RecurrentPrefix(len(like.cache), left_padding)
    return PrefixCache(left_padding, length)


def _mask(
    length: int, offset: int, left_padding: mx.array | None, return_array: bool, window_size: int | None
) -> mx.array | str | None:
    if left_padding is None and not return_array and (window_size is None or offset + length <= window_size):
        return "causal" if length > 1 else None
    mask: mx.array = create_causal_mask(length, offset, window_size=window_size, left_padding=left_padding)
    return mask
