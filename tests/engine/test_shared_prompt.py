"""Caches through which completions share a prompt."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache

from orpo_mlx.engine.shared_prompt import PrefixCache, PrefixCaches, RecurrentPrefix
from tests.conftest import CONFIGS, make_model


def brute_mask(before: int, length: int, window: int | None) -> Any:
    """(length, before + length): who may see whom, column by column."""
    columns = before + length
    distances = [[before + query - key for key in range(columns)] for query in range(length)]
    return [[0 <= distance < (window or columns) for distance in row] for row in distances]


def test_masks_are_of_the_fast_kind_until_a_window_bites() -> None:
    prefix = PrefixCache(4)
    assert prefix.make_mask(4) == "causal"
    assert prefix.make_mask(1) is None
    assert prefix.make_mask(4, window_size=4) == "causal"
    assert prefix.make_mask(4, window_size=3).tolist() == brute_mask(0, 4, 3)
    assert prefix.make_mask(4, return_array=True).tolist() == brute_mask(0, 4, None)
    rows = prefix.branch(2)
    assert rows.make_mask(5) == "causal"
    assert rows.make_mask(5, window_size=3).tolist() == brute_mask(4, 5, 3)


def test_rows_go_on_where_their_prefix_ends_and_do_not_see_each_other() -> None:
    prefix = PrefixCache(4)
    keys = mx.random.normal((2, 3, 4, 2))
    prefix.update_and_fetch(keys, 2 * keys)
    one, two = prefix.branch(1), prefix.branch(2)
    assert one.offset == two.offset == 4
    one.update_and_fetch(mx.ones((2, 3, 3, 2)), mx.ones((2, 3, 3, 2)))
    own = mx.random.normal((4, 3, 5, 2))
    joined, values = two.update_and_fetch(own, own)
    for row in range(4):
        assert mx.array_equal(joined[row], mx.concatenate([keys[row // 2], own[row]], axis=1)).item()
        assert mx.array_equal(values[row], mx.concatenate([2 * keys[row // 2], own[row]], axis=1)).item()


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_flow_from_rows_into_their_prefix(rows: int) -> None:
    def loss(keys: mx.array) -> mx.array:
        prefix = PrefixCache(3)
        prefix.update_and_fetch(keys, 2 * keys)
        total = mx.array(0.0)
        for _ in range(2):
            joined, values = prefix.branch(rows).update_and_fetch(*[mx.zeros((rows, 1, 1, 2))] * 2)
            total = total + joined.sum() + values.sum()
        return total

    expected = np.full((1, 1, 3, 2), 6.0 * rows)
    assert np.array(mx.grad(loss)(mx.ones((1, 1, 3, 2)))).tolist() == expected.tolist()


def test_rows_go_on_from_a_recurrent_state_and_leave_it() -> None:
    prefix = RecurrentPrefix(2)
    prefix[1] = state = mx.random.normal((2, 3))
    prefix.advance(3)
    first, second, both = prefix.branch(1), prefix.branch(1), prefix.branch(2)
    assert first.make_mask(4) is None
    assert first[0] is None
    assert first[1] is state
    first[1] = 2 * state
    assert second[1] is prefix[1] is state
    assert both[1].tolist() == [each for row in state.tolist() for each in (row, row)]


def test_layers_that_keep_several_things() -> None:
    class Hybrid:
        layers = (None,)

        def make_cache(self) -> list[CacheList]:
            return [CacheList(ArraysCache(2), KVCache())]

    caches = PrefixCaches(Hybrid())
    assert caches.fit
    (prefix,) = caches(3)
    assert isinstance(prefix[0], RecurrentPrefix)
    assert isinstance(prefix[1], PrefixCache)
    assert prefix.fresh(7)[1].length == 7
    rows = prefix.branch(2)
    assert isinstance(rows[0], ArraysCache)
    assert rows[1].offset == 3


def test_what_else_layers_keep_is_told_apart() -> None:
    class Chunked:
        layers = (None,)

        def make_cache(self) -> list[CacheList]:
            return [CacheList(KVCache(), ChunkedKVCache(8))]

    assert all(PrefixCaches(make_model(kind)).fit for kind in CONFIGS)
    assert not PrefixCaches(Chunked()).fit
