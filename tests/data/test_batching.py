"""Order, grouping and padding."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from orpo_mlx.data.batching import (
    TrainingOrder,
    bucket,
    collate,
    epoch_order,
    length_order,
    micro_batches,
    padded_tokens,
    sequence_tokens,
    split_by_completion,
    steps_per_epoch,
)
from orpo_mlx.data.row_counts import RowReport
from orpo_mlx.data.tokens.token_store import StoreWriter
from orpo_mlx.device_profile import CPU, GPU, RowLayout
from orpo_mlx.types import TokenizedPair
from tests.conftest import make_pairs

PAIRS = [TokenizedPair((1, 2, 3), (4,), (5, 6)), TokenizedPair((7, 8), (9, 10), (11,))]
JOINED = CPU.layout._replace(joined=True, row_multiple=1)


def predictions(pairs: list[TokenizedPair], layout: RowLayout) -> list[tuple[tuple[int, ...], int]]:
    """What precedes each wanted token, and the token, as a batch has them."""
    batch = collate(pairs, layout, with_prompt=True)
    prefixes = [()] * len(pairs) if batch.prefix_ids is None else [tuple(row) for row in np.array(batch.prefix_ids)]
    rows = []
    for ids in map(np.array, batch.row_ids):
        each = ids.shape[0] // len(pairs)
        rows += [(prefixes[number // each], tuple(row)) for number, row in enumerate(ids)]
    rows += [((), prefix) for prefix in prefixes]
    states = [(*prefix, *row[: end + 1]) for prefix, row in rows for end in range(len(row))]
    places, targets = np.array(batch.places).tolist(), np.array(batch.targets).tolist()
    return [(states[place], target) for place, target in zip(places, targets, strict=True)]


@pytest.mark.parametrize("layout", [CPU.layout, GPU.layout, JOINED, CPU.layout._replace(share_prompt=False)], ids=str)
@pytest.mark.parametrize("longest", [8, 90])
def test_every_token_is_predicted_from_what_precedes_it(layout: RowLayout, longest: int) -> None:
    pairs = make_pairs(5, longest=longest, seed=longest)
    sides = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    sides += [(pair.prompt_ids[:1], pair.prompt_ids[1:]) for pair in pairs]
    expected = [((*before, *ids[:place]), ids[place]) for before, ids in sides for place in range(len(ids))]
    assert predictions(pairs, layout)[: len(expected)] == expected


def test_members_are_each_pairs_own_tokens() -> None:
    batch = collate(PAIRS, GPU.layout, with_prompt=True)
    assert batch.prompt is not None
    counts = [np.array(part).sum(axis=1).tolist() for part in (batch.chosen, batch.rejected, batch.prompt)]
    assert counts == [[1, 2], [2, 1], [2, 1]]
    together = np.concatenate([np.array(part) for part in (batch.chosen, batch.rejected, batch.prompt)])
    # Padding is nobody's.
    assert together.sum(axis=0).tolist() == [1] * 9 + [0] * (together.shape[1] - 9)


def test_prompts_share_as_much_as_the_shortest_allows() -> None:
    batch = collate(PAIRS, CPU.layout._replace(row_multiple=1))
    assert np.array(batch.prefix_ids).tolist() == [[1], [7]]
    assert [np.array(ids).tolist() for ids in batch.row_ids] == [[[2, 3], [8, 9]], [[2, 3, 5], [8, 0, 0]]]
    joined = collate(PAIRS, JOINED)
    assert [np.array(ids).tolist() for ids in joined.row_ids] == [[[2, 3, 0], [2, 3, 5], [8, 9, 0], [8, 0, 0]]]


@pytest.mark.parametrize("up", [True, False])
def test_buckets_are_few_and_near(up: bool) -> None:
    sizes = [bucket(length, 32, GPU.layout, up=up) for length in range(1, 4097)]
    for length, size in enumerate(sizes, 1):
        assert 0 <= (size - length if up else length - size) < max(32, length / 8)
    # 16 multiples of 32 up to 512, and 8 sizes in each octave from there to 4,096.
    assert len(set(sizes)) <= 16 + 3 * 8 + 1
    assert bucket(37, 8, CPU.layout) == 40
    assert bucket(1000, 8, CPU.layout) == 1000


def test_values_by_completion() -> None:
    assert split_by_completion(PAIRS, np.arange(9)[:6])[0][0].tolist() == [0]
    assert [part.tolist() for pair in split_by_completion(PAIRS, np.arange(6)) for part in pair] == [
        [0],
        [3, 4],
        [1, 2],
        [5],
    ]


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
        padded = len(batch) * sum(
            max(len(ids) for ids in side) for side in zip(*(pair[:3] for pair in batch), strict=True)
        )
        assert len(batch) <= most_pairs
        assert padded <= most_tokens or len(batch) == 1


def test_micro_batches_are_no_smaller_than_they_must() -> None:
    # 10 + 8 + 8 tokens each: completions are padded to a multiple of 8.
    pairs = [TokenizedPair((1,) * 10, (2,) * 5, (3,) * 5)] * 7
    assert [len(batch) for batch in micro_batches(pairs, 100, 80, CPU.layout)] == [3, 3, 1]
    assert [len(batch) for batch in micro_batches(pairs, 2, 80, CPU.layout)] == [2, 2, 2, 1]


def test_a_pair_joins_the_batch_it_pads_least_or_none() -> None:
    long_prompt = [TokenizedPair((1,) * 400, (2,) * 8, (3,) * 8)] * 2
    long_answer = [TokenizedPair((1,) * 8, (2,) * 400, (3,) * 400)] * 2
    window = [long_prompt[0], long_answer[0], long_prompt[1], long_answer[1]]
    assert micro_batches(window, 4, 10_000) == [long_prompt, long_answer]


def test_a_gpu_pads_more_before_it_runs_another_batch() -> None:
    # Padded to the longer, the shorter one takes some 380 tokens more.
    pairs = [TokenizedPair((1,) * 8, (2,) * length, (3,) * length) for length in (100, 290)]
    assert [len(micro_batches(pairs, 4, 10_000, profile.layout)) for profile in (CPU, GPU)] == [2, 1]


@pytest.mark.parametrize("layout", [CPU.layout, GPU.layout], ids=["cpu", "gpu"])
def test_what_is_counted_as_padded_is_what_collate_makes(layout: RowLayout) -> None:
    for seed in range(20):
        pairs = make_pairs(5, seed=seed, longest=40 + 20 * seed)
        batch = collate(pairs, layout)
        arrays = [*batch.row_ids, *([] if batch.prefix_ids is None else [batch.prefix_ids])]
        assert padded_tokens(pairs, layout) == sum(ids.size for ids in arrays)


def test_orders_of_a_store_are_those_of_its_pairs(tmp_path: Path) -> None:
    pairs = [pair._replace(location=f"f:{number}") for number, pair in enumerate(make_pairs(80, longest=60))]
    with StoreWriter(tmp_path / "store") as writer:
        writer.extend(pairs)
        store = writer.close(RowReport())
    assert epoch_order(store, 4, seed=1, epoch=2) == epoch_order(pairs, 4, seed=1, epoch=2)
    assert length_order(store, 4) == length_order(pairs, 4)
