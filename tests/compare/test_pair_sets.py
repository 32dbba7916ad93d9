"""Which pairs a cell trains on and is judged by, and with which labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.compare.pair_sets import PairSubset, relabel, spread_out, three_splits
from orpo_mlx.config.checks import make_config
from orpo_mlx.errors import TrainingError
from orpo_mlx.training.prepare import prepare
from tests.conftest import make_pairs, write_id_rows


def test_labels() -> None:
    pairs = make_pairs(5)
    turned = [pair._replace(chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids) for pair in pairs]
    assert relabel(pairs, "given", 1, 0) == pairs
    assert relabel(pairs, "swapped", 1, 0) == turned
    counts: Counter[int] = Counter()
    swaps: Counter[int] = Counter()
    for step in range(400):
        found = relabel(pairs, "shuffled", step, 0)
        flags = [pair == other for pair, other in zip(found, turned, strict=True)]
        assert [pair if flag else other for pair, other, flag in zip(turned, pairs, flags, strict=True)] == found
        counts[sum(flags)] += 1
        swaps.update(index for index, flag in enumerate(flags) if flag)
    # Half of five is two or three, each as often; and no position is favoured.
    assert set(counts) == {2, 3}
    assert abs(counts[2] - 200) < 50
    assert all(abs(swaps[index] - 200) < 50 for index in range(5))
    assert relabel(pairs, "shuffled", 7, 0) == relabel(pairs, "shuffled", 7, 0)


def test_a_missing_split_is_taken_out_of_train(settings: dict[str, Any], tmp_path: Path) -> None:
    pairs = make_pairs(12)
    write_id_rows(tmp_path / "one" / "train.jsonl", pairs)
    run = prepare(make_config({**settings, "data": str(tmp_path / "one")}))
    splits = three_splits(run)
    ids = {name: [pair[:3] for pair in split] for name, split in splits.items()}
    assert {name: len(found) for name, found in ids.items()} == {"train": 8, "valid": 2, "test": 2}
    assert sorted(each for found in ids.values() for each in found) == sorted(pair[:3] for pair in pairs)
    assert ids["test"] == [pair[:3] for pair in pairs[4::5]]
    write_id_rows(tmp_path / "few" / "train.jsonl", pairs[:4])
    with pytest.raises(TrainingError, match="too few"):
        three_splits(prepare(make_config({**settings, "data": str(tmp_path / "few")})))


def test_spread_out() -> None:
    pairs = make_pairs(10)
    assert spread_out(pairs, -1) is pairs
    assert spread_out(pairs, 10) is pairs
    assert list(spread_out(pairs, 2)) == [pairs[2], pairs[7]]
    assert list(PairSubset(pairs, [3, 1, 2])[1:]) == [pairs[1], pairs[2]]
