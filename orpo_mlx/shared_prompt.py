"""Run a prompt once and both completions against it, on unmodified mlx-lm models.

mlx-lm's attention layers talk to a cache: they ask it for the position offset and the mask, hand it new keys and values
and attend over what it returns. These caches keep plain arrays, so gradients flow from the completions through the
prompt's keys and values. Prompts are padded on the left: each ends in the last column, its completion starts in the
next, and sliding windows stay contiguous.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache


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

    def extend(self) -> CompletionCache:
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


def count_prefix_caches(model: Any) -> int:
    """How many prefix caches a run of the model takes: one a layer, fewer where layers share keys and values, 0 where a
    layer keeps a recurrent state instead."""
    caches = make_prompt_cache(model)
    return len(caches) if all(isinstance(cache, (KVCache, RotatingKVCache)) for cache in caches) else 0


def _mask(
    length: int, offset: int, left_padding: mx.array | None, return_array: bool, window_size: int | None
) -> mx.array | str | None:
    if left_padding is None and not return_array and (window_size is None or offset + length <= window_size):
        return "causal" if length > 1 else None
    mask: mx.array = create_causal_mask(length, offset, window_size=window_size, left_padding=left_padding)
    return mask
