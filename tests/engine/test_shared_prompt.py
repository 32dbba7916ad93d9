"""Caches through which completions share a prompt."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache

from orpo_mlx.engine.shared_prompt import PrefixCache, PrefixCaches, RecurrentPrefix
from tests.conftest import CONFIGS, make_model


def brute_mask(prompt: int, length: int, padding: list[int], window: int | None) -> Any:
    """(B, 1, length, prompt + length): who may see whom, column by column."""
    columns = prompt + length
    mask = np.zeros((len(padding), 1, length, columns), bool)
    for row, pad in enumerate(padding):
        for query in range(length):
            for key in range(columns):
                distance = prompt + query - key
                mask[row, 0, query, key] = 0 <= distance < (window or columns) and key >= pad
    return mask


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padding", [[0, 2], [1, 0]])
def test_masks_against_brute_force(padding: list[int], window: int | None) -> None:
    prefix = PrefixCache(mx.array(padding), 4)
    assert np.array_equal(np.array(prefix.make_mask(4, window_size=window)), brute_mask(0, 4, padding, window))
    prefix.update_and_fetch(mx.zeros((2, 1, 4, 2)), mx.zeros((2, 1, 4, 2)))
    completion = prefix.branch()
    assert np.array_equal(np.array(completion.make_mask(5, window_size=window)), brute_mask(4, 5, padding, window))


def test_without_padding_the_mask_is_the_fast_kind_until_a_window_bites() -> None:
    prefix = PrefixCache(None, 4)
    assert prefix.make_mask(4) == "causal"
    assert prefix.make_mask(1) is None
    assert prefix.make_mask(4, window_size=4) == "causal"
    assert np.array_equal(np.array(prefix.make_mask(4, window_size=3)), brute_mask(0, 4, [0], 3)[0, 0])
    assert prefix.make_mask(4, return_array=True).dtype == mx.bool_


def test_offsets_are_positions_and_completions_do_not_see_each_other() -> None:
    prefix = PrefixCache(mx.array([0, 2]), 4)
    assert np.array(prefix.offset).tolist() == [0, -2]
    keys = mx.random.normal((2, 1, 4, 2))
    prefix.update_and_fetch(keys, keys)
    first, second = prefix.branch(), prefix.branch()
    assert np.array(first.offset).tolist() == [4, 2]
    first.update_and_fetch(mx.ones((2, 1, 3, 2)), mx.ones((2, 1, 3, 2)))
    joined, _ = second.update_and_fetch(mx.zeros((2, 1, 1, 2)), mx.zeros((2, 1, 1, 2)))
    assert mx.array_equal(joined, mx.concatenate([keys, mx.zeros((2, 1, 1, 2))], axis=2)).item()


def test_gradients_flow_from_a_completion_into_the_prompt() -> None:
    def loss(keys: mx.array) -> mx.array:
        prefix = PrefixCache(None, 3)
        prefix.update_and_fetch(keys, 2 * keys)
        total = mx.array(0.0)
        for _ in range(2):
            joined, values = prefix.branch().update_and_fetch(mx.zeros((1, 1, 1, 2)), mx.zeros((1, 1, 1, 2)))
            total = total + joined.sum() + values.sum()
        return total

    assert np.array(mx.grad(loss)(mx.ones((1, 1, 3, 2)))).tolist() == np.full((1, 1, 3, 2), 6.0).tolist()


def test_a_completion_goes_on_from_a_recurrent_state_and_leaves_it() -> None:
    padding = mx.array([2, 0])
    prefix = RecurrentPrefix(2, padding)
    assert np.array(prefix.make_mask(3)).tolist() == [[False, False, True], [True, True, True]]
    prefix[1] = state = mx.ones((2, 3))
    prefix.advance(3)
    assert padding.tolist() == [2, 0]
    first, second = prefix.branch(), prefix.branch()
    assert first.make_mask(4) is None
    assert first[0] is None
    assert first[1] is state
    first[1] = 2 * state
    assert second[1] is prefix[1] is state


def test_layers_that_keep_several_things() -> None:
    class Hybrid:
        layers = (None,)

        def make_cache(self) -> list[CacheList]:
            return [CacheList(ArraysCache(2), KVCache())]

    caches = PrefixCaches(Hybrid())
    assert caches.fit
    (prefix,) = caches(mx.array([1]), 3)
    assert isinstance(prefix[0], RecurrentPrefix)
    assert isinstance(prefix[1], PrefixCache)
    (completion,) = [prefix.branch()]
    assert isinstance(completion[0], ArraysCache)
    assert completion[1].offset.tolist() == [2]


def test_what_else_layers_keep_is_told_apart() -> None:
    class Chunked:
        layers = (None,)

        def make_cache(self) -> list[CacheList]:
            return [CacheList(KVCache(), ChunkedKVCache(8))]

    assert all(PrefixCaches(make_model(kind)).fit for kind in CONFIGS)
    assert not PrefixCaches(Chunked()).fit
