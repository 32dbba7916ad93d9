"""The figures of a data set, against counts made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from orpo_mlx.data.batching import collate, epoch_order, micro_batches
from orpo_mlx.data.pairs import Reading
from orpo_mlx.data.sources import FileSource
from orpo_mlx.data.splits import Lengths, Split, tokenized_split
from orpo_mlx.data.statistics import as_text, draw_lengths, inspect_splits
from orpo_mlx.device_profile import VARIABLE
from orpo_mlx.types import Batch, TokenizedPair
from tests.conftest import make_pairs, write_id_rows, write_rows


def split_of(path: Path, tokenizer: Any = None, length: int = 10_000) -> Split:
    return tokenized_split(FileSource([path]), Reading(), tokenizer, Lengths(length))


def figures_of(splits: dict[str, Split], tokenizer: Any = None) -> dict[str, Any]:
    return inspect_splits(splits, tokenizer, batch_size=2, micro_batch_tokens=64, seed=0)


def test_lengths_shares_and_bias(tmp_path: Path) -> None:
    pairs = [
        TokenizedPair((1, 2), (3, 4, 5), (6,)),
        TokenizedPair((1, 2), (3,), (6, 7)),
        TokenizedPair((1, 2, 3, 4), (3, 4), (6, 7)),
        TokenizedPair((9,), (3, 4, 5, 6, 7, 8), (1, 2)),
        TokenizedPair((9,), (3,), (3,)),
    ]
    table = figures_of({"train": split_of(write_id_rows(tmp_path / "x.jsonl", pairs))})["splits"]["train"]
    assert (table["rows_read"], table["rows_kept"], table["rows_dropped"]) == (5, 4, {"equal_sides": 1})
    assert table["dropped_places"] == {"equal_sides": [f"{tmp_path}/x.jsonl:5"]}
    assert table["shape"] == "token ids"
    prompt = table["lengths"]["prompt"]
    assert (prompt["min"], prompt["median"], prompt["max"], prompt["mean"]) == (1, 2, 4, 2.25)
    assert table["lengths"]["rejected"]["mean"] == 7 / 4
    assert table["prompt_token_share"] == pytest.approx(9 / (9 + 12 + 7))
    assert (table["distinct_prompts"], table["duplicated_prompts"]) == (3, 1)
    bias = table["length_bias"]
    assert (bias["chosen_longer"], bias["chosen_shorter"], bias["mean_extra_tokens"]) == (0.5, 0.25, 5 / 4)
    assert bias["accuracy_of_picking_the_longer"] == 0.625
    assert [example["place"].rpartition(":")[2] for example in table["examples"]] == ["1", "3", "4"]
    assert table["examples"][0]["chosen"] == "3 4 5"


def tokens_of(batch: Batch) -> tuple[int, int]:
    """Tokens with and without padding, which is 0 here and stands for nothing else."""
    arrays = [*batch.row_ids, *([] if batch.prefix_ids is None else [batch.prefix_ids])]
    return sum(ids.size for ids in arrays), sum(int((ids != 0).sum()) for ids in arrays)


def test_padding_is_that_of_the_batches_training_would_run(tmp_path: Path) -> None:
    pairs = make_pairs(40, longest=50)
    table = figures_of({"train": split_of(write_id_rows(tmp_path / "x.jsonl", pairs))})["splits"]["train"]
    real = run = real_block = block = 0
    for indices in epoch_order(pairs, 2, seed=0, epoch=0):
        window = [pairs[index] for index in indices]
        for batch in (collate(micro) for micro in micro_batches(window, 2, 64)):
            run, real = run + tokens_of(batch)[0], real + tokens_of(batch)[1]
        block, real_block = block + tokens_of(collate(window))[0], real_block + tokens_of(collate(window))[1]
    assert table["padding_share"] == pytest.approx(1 - real / run)
    assert table["padding_share_one_block"] == pytest.approx(1 - real_block / block)


def test_overlap_of_splits_and_totals(tmp_path: Path) -> None:
    pairs = make_pairs(12)
    splits = {
        "train": split_of(write_id_rows(tmp_path / "a.jsonl", pairs[:8])),
        "valid": split_of(write_id_rows(tmp_path / "b.jsonl", pairs[6:9])),
        "test": split_of(write_id_rows(tmp_path / "c.jsonl", pairs[9:])),
    }
    figures = figures_of(splits)
    assert figures["overlap"] == {"valid in train": 2, "test in train": 0, "test in valid": 0}
    assert (figures["rows_read"], figures["rows_kept"], figures["pairs"]) == (14, 14, 14)
    assert "overlap: 2 prompts of valid in train" in as_text(figures)


def test_text_shows_what_is_trained_and_nothing_that_moves_the_cursor(tmp_path: Path, model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    rows = [{"prompt": "Q\x1b[2J", "chosen": "A\r", "rejected": "B"}]
    text = as_text(figures_of({"train": split_of(write_rows(tmp_path / "x.jsonl", rows), tokenizer)}, tokenizer))
    assert "prompt    <|start|>user↵Q\\x1b[2J<|end|>↵<|start|>assistant↵\n" in text
    assert "⟦A\\r<|end|>↵⟧" in text
    assert "\x1b" not in text
    assert "shape: strings, explicit prompt" in text


def test_the_histogram_is_a_picture(tmp_path: Path) -> None:
    splits = {
        "train": split_of(write_id_rows(tmp_path / "a.jsonl", make_pairs(30, longest=90))),
        "test": split_of(write_id_rows(tmp_path / "b.jsonl", [TokenizedPair((1,), (2,), (3,))])),
    }
    draw_lengths(splits, 2048, tmp_path / "h.png")
    content = (tmp_path / "h.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


def test_padding_of_real_pairs_is_under_three_percent(
    shared: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A GPU pads more, so that shapes repeat.
    monkeypatch.setenv(VARIABLE, "cpu")
    tokenizer = load_tokenizer(model_folder)
    split = split_of(shared / "data" / "real_pairs.train.jsonl", tokenizer, 10**6)
    figures = inspect_splits({"train": split}, tokenizer, batch_size=4, micro_batch_tokens=2048, seed=0)
    assert figures["rows_kept"] == figures["rows_read"] == 180
    assert figures["splits"]["train"]["padding_share"] < 0.03
