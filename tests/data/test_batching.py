"""Order, grouping and padding."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from orpo_mlx.data.batching import (
    TrainingOrder,
    collate,
    epoch_order,
    length_order,
    micro_batches,
    padded_tokens,
    sequence_tokens,
    steps_per_epoch,
)
from orpo_mlx.data.row_counts import RowReport
from orpo_mlx.data.token_store import StoreWriter
from orpo_mlx.types import TokenizedPair
from tests.conftest import make_pairs


def test_collate_pads_prompts_on_the_left_and_completions_on_the_right() -> None:
    batch = collate([TokenizedPair((1, 2, 3), (4,), (5, 6)), TokenizedPair((7,), (8, 9), (10,))])
    assert np.array(batch.prompt_ids).tolist() == [[1, 2, 3], [0, 0, 7]]
    assert np.array(batch.prompt_mask).tolist() == [[True, True, True], [False, False, True]]
    assert batch.left_padding is not None
    assert np.array(batch.left_padding).tolist() == [0, 2]
    assert np.array(batch.chosen_ids)[:, :2].tolist() == [[4, 0], [8, 9]]
    assert np.array(batch.chosen_mask).sum(axis=1).tolist() == [1, 2]
    assert np.array(batch.rejected_mask).sum(axis=1).tolist() == [2, 1]


def test_equal_prompts_have_no_padding() -> None:
    assert collate([TokenizedPair((1, 2), (3,), (4,)), TokenizedPair((5, 6), (7, 8), (9,))]).left_padding is None


def test_collate_needs_pairs() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        collate([])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "size"), [(1, 4), (8, 4), (37, 4), (200, 8)])
def test_every_pair_once_per_epoch(count: int, size: int, shuffle: bool) -> None:
    pairs = make_pairs(count)
    batches = epoch_order(pairs, size, seed=3, epoch=2, shuffle=shuffle)
    assert sorted(itertools.chain(*batches)) == list(range(count))
    assert len(batches) == steps_per_epoch(count, size)
    assert all(len(batch) == size for batch in batches[:-1])


def test_order_is_a_function_of_seed_and_epoch() -> None:
    pairs = make_pairs(50)
    one = epoch_order(pairs, 4, seed=1, epoch=0)
    assert one == epoch_order(pairs, 4, seed=1, epoch=0)
    assert one != epoch_order(pairs, 4, seed=2, epoch=0)
    assert one != epoch_order(pairs, 4, seed=1, epoch=1)
    assert epoch_order(pairs, 4, seed=1, epoch=0, shuffle=False)[0] == [0, 1, 2, 3]


def test_batches_are_of_like_length() -> None:
    pairs = make_pairs(256, longest=100)

    def spread(batches: list[list[int]]) -> float:
        lengths = [[pairs[index].pair_tokens for index in batch] for batch in batches]
        return float(np.mean([max(group) - min(group) for group in lengths]))

    assert spread(epoch_order(pairs, 4, seed=0, epoch=0)) < 0.3 * spread(
        epoch_order(pairs, 4, seed=0, epoch=0, shuffle=False)
    )


def test_training_order_continues_from_a_step() -> None:
    pairs = make_pairs(10)
    whole = list(itertools.islice(TrainingOrder(pairs, 4, seed=5, shuffle=True), 8))
    rest = list(itertools.islice(TrainingOrder(pairs, 4, seed=5, shuffle=True, step=5), 3))
    assert rest == whole[5:]
    assert sorted(itertools.chain(*whole[:3])) == list(range(10))
    assert sorted(itertools.chain(*whole[3:6])) == list(range(10))


def test_length_order_covers_everything() -> None:
    pairs = make_pairs(11)
    batches = length_order(pairs, 4)
    assert sorted(itertools.chain(*batches)) == list(range(11))
    lengths = [pairs[index].pair_tokens for index in itertools.chain(*batches)]
    assert lengths == sorted(lengths)


def test_sequence_tokens_counts_predictions_of_prompt_and_chosen() -> None:
    assert sequence_tokens([TokenizedPair((1, 2, 3), (4, 5), (6,)), TokenizedPair((1,), (2,), (3,))]) == 4 + 1


@pytest.mark.parametrize(("most_pairs", "most_tokens"), [(1, 10**9), (4, 60), (10**9, 100), (3, 1), (10**9, 10**9)])
def test_micro_batches_keep_every_pair_within_both_limits(most_pairs: int, most_tokens: int) -> None:
    window = make_pairs(20, longest=30)
    batches = micro_batches(window, most_pairs, most_tokens)
    assert sorted(itertools.chain(*batches)) == sorted(window)
    for batch in batches:
        padded = len(batch) * sum(max(len(pair[side]) for pair in batch) for side in range(3))
        assert len(batch) <= most_pairs
        assert padded <= most_tokens or len(batch) == 1


def test_micro_batches_are_no_smaller_than_they_must() -> None:
    # 10 + 8 + 8 tokens each: completions are padded to a multiple of 8.
    pairs = [TokenizedPair((1,) * 10, (2,) * 5, (3,) * 5)] * 7
    assert [len(batch) for batch in micro_batches(pairs, 100, 80)] == [3, 3, 1]
    assert [len(batch) for batch in micro_batches(pairs, 2, 80)] == [2, 2, 2, 1]


def test_a_pair_joins_the_batch_it_pads_least_or_none() -> None:
    long_prompt = [TokenizedPair((1,) * 400, (2,) * 8, (3,) * 8)] * 2
    long_answer = [TokenizedPair((1,) * 8, (2,) * 400, (3,) * 400)] * 2
    window = [long_prompt[0], long_answer[0], long_prompt[1], long_answer[1]]
    assert micro_batches(window, 4, 10_000) == [long_prompt, long_answer]


def test_what_is_counted_as_padded_is_what_collate_makes() -> None:
    for seed in range(20):
        pairs = make_pairs(5, seed=seed, longest=40)
        batch = collate(pairs)
        assert padded_tokens(pairs) == sum(ids.size for ids in (batch.prompt_ids, batch.chosen_ids, batch.rejected_ids))


def test_orders_of_a_store_are_those_of_its_pairs(tmp_path: Path) -> None:
    pairs = [pair._replace(location=f"f:{number}") for number, pair in enumerate(make_pairs(80, longest=60))]
    with StoreWriter(tmp_path / "store") as writer:
        writer.extend(pairs)
        store = writer.close(RowReport())
    assert epoch_order(store, 4, seed=1, epoch=2) == epoch_order(pairs, 4, seed=1, epoch=2)
    assert length_order(store, 4) == length_order(pairs, 4)
