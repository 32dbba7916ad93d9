"""The open tier's prompts and pairs, on answers that are made up."""

from __future__ import annotations

import builtins
import itertools
from typing import Any

import pytest

from orpo_mlx.compare.exercise import prompts
from orpo_mlx.compare.exercise.open_task import (
    CLEAN,
    FLIPPED,
    LONGER,
    Answer,
    best_and_worst,
    make_pairs,
    sentiment_scorer,
)
from orpo_mlx.compare.exercise.prompts import open_prompts
from orpo_mlx.errors import ConfigError


def answer(length: int, gold: float) -> Answer:
    return Answer(tuple(range(length)), "", gold)


def test_splits_share_neither_frames_nor_topics_nor_prompts() -> None:
    assert [len(open_prompts(split)) for split in ("train", "valid", "test")] == [300, 40, 60]
    assert open_prompts("train", 20) == open_prompts("train")[:20]
    for table in (prompts._FRAMES, prompts._TOPICS):
        every = list(itertools.chain.from_iterable(table.values()))
        assert len(set(every)) == len(every)
    with pytest.raises(ValueError, match="61"):
        open_prompts("test", 61)


def test_a_clean_pair_is_the_farthest_apart_of_nearly_one_length() -> None:
    answers = [answer(10, 0.1), answer(13, 0.9), answer(30, 1.0), answer(12, -0.2)]
    found = best_and_worst(answers, None)
    assert found is not None
    assert [each.gold for each in found] == [0.9, -0.2]
    # The longest answer is the best, and nothing has its length.
    assert best_and_worst([answer(10, 0.0), answer(14, 1.0)], None) is None
    assert best_and_worst([answer(10, 0.0), answer(10, 0.05)], None) is None


def test_in_the_length_variant_the_better_one_is_longer_or_shorter_as_asked() -> None:
    answers = [answer(10, 0.5), answer(20, 0.0), answer(30, 0.9), answer(33, 1.0)]
    for longer, golds in ((True, [1.0, 0.0]), (False, [0.5, 0.0])):
        found = best_and_worst(answers, longer)
        assert found is not None
        assert [each.gold for each in found] == golds


def test_shares_of_variants_are_what_they_say_and_prompts_without_a_pair_are_left_out() -> None:
    asked = [(number,) for number in range(400)]
    answers = [[answer(10, 0.0), answer(11, 1.0), answer(20, 0.5), answer(4, 0.4)]] * 399 + [[answer(9, 0.5)] * 4]
    golds = {each.ids: each.gold for each in answers[0]}

    def pairs(variant: str) -> list[Any]:
        return make_pairs(asked, answers, variant)

    assert len(pairs(CLEAN)) == 399
    assert all(golds[pair.chosen_ids] > golds[pair.rejected_ids] for pair in pairs(CLEAN))
    flipped = [golds[pair.chosen_ids] < golds[pair.rejected_ids] for pair in pairs(FLIPPED)]
    assert sum(flipped) / 399 == pytest.approx(0.25, abs=0.06)
    assert all(golds[pair.chosen_ids] > golds[pair.rejected_ids] for pair in pairs(LONGER))
    longer = [len(pair.chosen_ids) - len(pair.rejected_ids) for pair in pairs(LONGER)]
    assert sum(extra > 0 for extra in longer) / 399 == pytest.approx(0.8, abs=0.06)
    assert min(map(abs, longer)) >= 4


def test_the_scorer_is_vaders_and_a_missing_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vaderSentiment")
    score = sentiment_scorer()
    # From VADER's own README, version 3.3.2.
    assert score("VADER is smart, handsome, and funny.") == 0.8316
    assert score("VADER is not smart, handsome, nor funny.") == -0.7424
    whole = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("vaderSentiment"):
            raise ImportError(name)
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"orpo-mlx\[exercise\]"):
        sentiment_scorer()
