"""The open tier's prompts and pairs, on answers that are made up."""

from __future__ import annotations

import builtins
import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from orpo_mlx.compare.exercise import open_task, prompts
from orpo_mlx.compare.exercise.open_task import (
    CLEAN,
    FLIPPED,
    LONGER,
    REPLY_TOKENS,
    Answer,
    OpenTask,
    best_and_worst,
    make_pairs,
    sentence_ends,
    sentiment_scorer,
)
from orpo_mlx.compare.exercise.prompts import open_prompts
from orpo_mlx.compare.exercise.sizes import QUICK_OPEN
from orpo_mlx.compare.exercise.trainer import fresh_run
from orpo_mlx.errors import ConfigError
from orpo_mlx.judging.divergence import sequence_kl
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.models.loading import load


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


def test_tokens_that_end_a_sentence_or_a_line(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    found = sentence_ends(tokenizer)
    for text, ends in ((".", True), ("?", True), ("!", True), ("\n", True), (",", False), ("a", False), ('"', False)):
        assert (tokenizer.encode(text, add_special_tokens=False)[-1] in found) == ends, text


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> OpenTask:
    """The open tier on a model of two layers, scored by the share of vowels."""
    loaded = load(str(model_folder), dtype="float32")
    monkeypatch.setattr(open_task, "load", lambda name, dtype: loaded)
    monkeypatch.setattr(
        open_task, "sentiment_scorer", lambda: lambda text: sum(each in "aeiou" for each in text) / (len(text) + 1)
    )
    cells: Any = SimpleNamespace(keep=lambda identity, compute: json.loads(json.dumps(compute())))
    return OpenTask(QUICK_OPEN, cells)


def test_a_reply_is_a_sentence_with_the_token_that_ended_it(task: OpenTask) -> None:
    ends = set(task._stops.eos_token_ids)
    for answer in itertools.chain.from_iterable(task._answers["train"]):
        *before, last = answer.ids
        assert not ends & set(before)
        assert last in ends or len(answer.ids) == REPLY_TOKENS
    assert {answer.ids[-1] in ends for each in task._answers["train"] for answer in each} == {True, False}


def test_a_model_that_was_not_trained_is_the_base_in_every_measure(task: OpenTask) -> None:
    with fresh_run(task.loaded, dataclasses.replace(task.shared(), num_layers=2)) as run:
        for split in ("valid", "test"):
            found = task.look(split)
            assert found["gold"] == task._base_gold[split]
            assert found["win"] == [0.5] * len(found["gold"])
            assert found["kl"] == pytest.approx([0.0] * len(found["gold"]), abs=1e-5)
        besides = task.besides()
        assert besides["chosen_drift"] == pytest.approx([0.0] * len(task.held_out_pairs()), abs=1e-5)
        before = besides["text_nll"][0]
        moved = [(name, value + 0.1) for name, value in adapter_weights(run.loaded.model).items()]
        run.loaded.model.load_weights(moved, strict=False)
        found = task.look("test")
        # The reply to a prompt, its KL to the base by the library's own function.
        for prompt, kl, answer in zip(task._ids["test"], found["kl"], task._seen, strict=True):
            run.loaded.model.eval()
            assert kl == pytest.approx(sequence_kl(run.loaded.model, prompt, answer.ids).item(), rel=1e-3, abs=1e-5)
        assert min(found["kl"]) > 0
        assert task.besides()["text_nll"][0] != before
        assert [each["reply"] for each in task.replies()] == [answer.text for answer in task._seen[:4]]
