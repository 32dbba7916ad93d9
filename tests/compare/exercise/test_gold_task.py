"""The exact tier's task: no length cue, a known reward, labels and measures that are what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from orpo_mlx.compare.exercise.contenders import CONTENDERS, Contender, grid
from orpo_mlx.compare.exercise.gold_task import REPLY_TOKENS, GoldTask
from orpo_mlx.compare.exercise.sizes import QUICK_EXACT
from orpo_mlx.compare.exercise.study import relabelled, shuffles
from orpo_mlx.compare.exercise.trainer import fresh_run, reward_margins, train
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.engine.score import score_pairs
from orpo_mlx.types import TokenizedPair

SMALL = QUICK_EXACT._replace(pairs=400, held_out=200, valid_prompts=24, test_prompts=24, samples=2)


@pytest.fixture(scope="module")
def task() -> GoldTask:
    return GoldTask(SMALL)


def gold(task: GoldTask, ids: tuple[int, ...]) -> float:
    return float(task.token_gold[list(ids)].sum())


def right(task: GoldTask, pairs: list[TokenizedPair]) -> list[bool]:
    return [gold(task, pair.chosen_ids) > gold(task, pair.rejected_ids) for pair in pairs]


def test_nothing_but_gold_tells_the_sides_apart(task: GoldTask) -> None:
    pairs = task.train_pairs("0 % flipped")
    assert {len(side) for pair in pairs for side in (pair.chosen_ids, pair.rejected_ids)} == {REPLY_TOKENS}
    replies = np.array([gold(task, side) for pair in pairs for side in (pair.chosen_ids, pair.rejected_ids)])
    # In units of the base model's own replies; 800 of them.
    assert abs(replies.mean()) < 0.15
    assert replies.std() == pytest.approx(1, abs=0.12)
    rows = score_pairs(PairScorer(task.loaded.model), task.held_out_pairs(), batch_size=64)
    assert sum(row["prefers_chosen"] for row in rows) * 2 == len(rows)
    assert all(right(task, task.held_out_pairs()))


def test_labels_are_bradley_terrys_and_flips_are_nested(task: GoldTask) -> None:
    clean, some, more = (task.train_pairs(f"{share} % flipped") for share in (0, 20, 40))
    apart = np.array([gold(task, pair.chosen_ids) - gold(task, pair.rejected_ids) for pair in clean])
    # The chance of the label that was drawn, by Bradley and Terry: its mean is the share that agrees with the better.
    chance = 1 / (1 + np.exp(-np.abs(apart) / 0.5))
    assert np.mean(apart > 0) == pytest.approx(chance.mean(), abs=3 * np.sqrt((chance * (1 - chance)).mean() / 400))
    changed = [[a != b for a, b in zip(clean, other, strict=True)] for other in (some, more)]
    assert [np.mean(each) for each in changed] == pytest.approx([0.2, 0.4], abs=0.08)
    assert all(b for a, b in zip(*changed, strict=True) if a)


def test_measures_are_those_of_the_drawn_tokens_on_average(task: GoldTask) -> None:
    base = task.measure("test", 24, 2)
    assert base.kl.max() < 1e-5
    with fresh_run(task.loaded, task.shared()) as run:
        weights = run.loaded.model.trainable_parameters()
        run.loaded.model.update(_moved(weights))
        found = task.measure("test", 256, 2)
        # The plain estimator of the same KL: mean of log π(y) - log π₀(y) over drawn replies.
        prompts = task.prompts("test", 256)
        drawn = task.sample(prompts, 9).replies
        pairs = [
            TokenizedPair(tuple(prompt.tolist()), tuple(reply.tolist()), tuple(reply.tolist()))
            for prompt, reply in zip(prompts, drawn, strict=True)
        ]
        ours = [row["chosen_logps"] for row in score_pairs(run.scorer, pairs, batch_size=64)]
    theirs = [row["chosen_logps"] for row in score_pairs(PairScorer(task.loaded.model), pairs, batch_size=64)]
    plain = np.array(ours) - np.array(theirs)
    assert found.kl.mean() > 0.05
    assert found.kl.mean() == pytest.approx(plain.mean(), abs=4 * plain.std() / np.sqrt(256))
    of_drawn = np.array([gold(task, tuple(reply)) for reply in drawn])
    assert found.gold.mean() == pytest.approx(of_drawn.mean(), abs=4 * of_drawn.std() / np.sqrt(256))


def _moved(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _moved(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_moved(value) for value in tree]
    return tree + 0.03


def test_the_frontier_is_the_best_there_is(task: GoldTask) -> None:
    # For a Gaussian reward, gold σ²/τ at KL σ²/2τ²: the line gold = √(2 KL).
    for point in task.frontier("test", 32, 32, (8.0, 4.0, 2.0)):
        # The mean of 1,024 rewards of variance 1 is off by as much.
        assert point["gold"] == pytest.approx(np.sqrt(2 * point["kl"]), rel=0.1, abs=3 / np.sqrt(1024))


def test_a_model_is_left_as_it_was_found(task: GoldTask) -> None:
    pairs = task.held_out_pairs()[:8]
    before = score_pairs(PairScorer(task.loaded.model), pairs)
    with fresh_run(task.loaded, task.shared()) as run:
        run.loaded.model.update(_moved(run.loaded.model.trainable_parameters()))
        assert reward_margins(run, "sft", pairs).any()
    assert score_pairs(PairScorer(task.loaded.model), pairs) == before


def test_shuffles_and_their_mirror_images_swap_each_pair_once(task: GoldTask) -> None:
    pairs = task.train_pairs("0 % flipped")
    assert relabelled(pairs, "given") == pairs
    assert all(a.chosen_ids == b.rejected_ids for a, b in zip(pairs, relabelled(pairs, "swapped"), strict=True))
    found = [relabelled(pairs, name) for name in shuffles(2)]
    for one, other in zip(found[::2], found[1::2], strict=True):
        kept = [a == b for a, b in zip(pairs, one, strict=True)]
        assert sum(kept) * 2 == len(pairs)
        assert kept == [a != b for a, b in zip(pairs, other, strict=True)]
    assert found[0] != found[2]


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_every_contender_takes_steps_and_ranks_pairs_by_its_own_reward(task: GoldTask, contender: Contender) -> None:
    config = contender.config(grid(contender, (1e-3, 3e-3), 2)[1], task.shared(), 0)
    pairs = task.train_pairs("0 % flipped")[:16]
    unseen = {"gold": 0.0, "kl": 0.0}
    with fresh_run(task.loaded, config) as run:
        before = reward_margins(run, contender.reward, pairs)
        found = train(run, contender, pairs * 4, (1, 2), lambda run: unseen, 1.0, unseen)
        after = reward_margins(run, contender.reward, pairs)
    assert found.failed is None
    assert np.isfinite(found.losses).all()
    assert [point["step"] for point in found.curve] == [0, 1, 2]
    # The very pairs it was trained on.
    assert (after - before).mean() > 0
