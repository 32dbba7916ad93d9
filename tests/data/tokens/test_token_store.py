"""Pairs on disk come back as they were, and only if the files are those that were written."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from orpo_mlx.data.row_counts import RowReport
from orpo_mlx.data.tokens.token_store import StoreWriter, TokenStore
from orpo_mlx.data.tokens.trained_turns import read_ids
from orpo_mlx.types import TokenizedGroup, TokenizedPair
from tests.conftest import make_pairs


def placed(pairs: list[TokenizedPair]) -> list[TokenizedPair]:
    """Pairs of three files, several of one line among them."""
    return [
        pair._replace(
            location=f"f{number // 40}:x:{number // 2 + 1}",
            margin=None if number % 3 == 0 else number / 7 - 3,
            weight=1.0 if number % 2 == 0 else number / 9,
            chosen_ids=tuple(token if number % 5 else ~token for token in pair.chosen_ids),
        )
        for number, pair in enumerate(pairs)
    ]


def write(folder: Path, pairs: list[TokenizedPair]) -> TokenStore:
    with StoreWriter(folder) as writer:
        writer.extend(pairs[:50])
        writer.extend([])
        writer.extend(pairs[50:])
        report = RowReport(limit="L 4", rows_read=7)
        report.drop("too_long", "f:3")
        return writer.close(report)


def test_pairs_come_back(tmp_path: Path) -> None:
    pairs = placed(make_pairs(100))
    store = write(tmp_path / "a" / "store", pairs)
    assert list(store) == pairs
    assert store[-1] == pairs[-1]
    assert store[3:9:2] == pairs[3:9:2]
    with pytest.raises(IndexError):
        store[100]
    assert store.lengths.tolist() == [[len(side) for side in pair[:3]] for pair in pairs]
    largest = max(pairs, key=lambda pair: max(max(read_ids(side)) for side in pair[:3]))
    assert tuple(store.largest) == (max(max(read_ids(side)) for side in largest[:3]), largest.location)
    assert store.report.dropped == {"too_long": 1}
    assert store.report.left_out == ["f:3: longer than L 4."]
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["store"]


def test_equal_prompts_have_equal_hashes(tmp_path: Path) -> None:
    first, second, third = placed(make_pairs(3, seed=5))
    store = write(tmp_path / "store", [first, second, third._replace(prompt_ids=first.prompt_ids)])
    hashes = store.prompt_hashes
    assert hashes[0] == hashes[2] != hashes[1]


def test_no_pairs(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [])
    assert len(store) == 0
    assert list(store) == []


def write_in_a_process(folder: Path, start: Barrier) -> None:
    pairs = placed(make_pairs(100))
    for number in range(60):
        start.wait(timeout=60)
        assert list(write(folder / str(number), pairs)) == pairs


def test_processes_that_write_the_same_store_at_once_all_have_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    writers = [context.Process(target=write_in_a_process, args=(tmp_path / "stores", start)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    left = sorted(path.name for path in (tmp_path / "stores").iterdir())
    assert left == sorted(str(number) for number in range(60))
    assert all(len(TokenStore(tmp_path / "stores" / name)) == 100 for name in left)


def test_a_store_that_was_not_closed_leaves_nothing(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        writer.extend(placed(make_pairs(3)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tokens.i32", "index.npy", "store.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "empty"])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path / "store", placed(make_pairs(60)))
    path = tmp_path / "store" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flip":
        position = content.index(b"sha256") + 12 if name == "store.json" else len(content) - 40
        content[position] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(ValueError, match="store: "):
        TokenStore(tmp_path / "store")


def test_an_index_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    write(tmp_path / "store", placed(make_pairs(6)))
    np.save(tmp_path / "store" / "index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a whole token store"):
        TokenStore(tmp_path / "store")


def test_texts_that_begin_with_the_same_token_are_different(tmp_path: Path) -> None:
    # As of every text, its first token is all that nothing comes before.
    with StoreWriter(tmp_path / "store") as writer:
        writer.extend(
            [TokenizedGroup((1,), (rest,), (1.0,), True, ((0, 0),), "f:1") for rest in ((5, 6), (5, 7), (5, 6))]
        )
        hashes = writer.close(RowReport()).prompt_hashes
    assert hashes[0] == hashes[2] != hashes[1]
