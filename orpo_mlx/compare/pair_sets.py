"""Which pairs a cell trains on, tunes on and is judged by, and with which labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from orpo_mlx.data.batching import best_and_worst
from orpo_mlx.data.prompts import evenly_spread
from orpo_mlx.errors import TrainingError
from orpo_mlx.training.run import Run
from orpo_mlx.types import Example, TokenizedPair

_HELD_OUT_EVERY = 5

Pairs = Sequence[Example]


class PairSubset(Sequence[Example]):
    """Some of a sequence's pairs, read when they are asked for."""

    def __init__(self, pairs: Pairs, indices: Sequence[int]) -> None:
        self._pairs = pairs
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Example | Pairs:
        if isinstance(index, slice):
            return PairSubset(self._pairs, self._indices[index])
        return self._pairs[self._indices[index]]


def three_splits(run: Run) -> dict[str, Pairs]:
    """Pairs to train on, to choose learning rates on, and to judge by.

    A missing valid or test split is made of every fifth pair of train (of what is left of it), which is then not
    trained on.

    Raises:
        TrainingError: too few pairs to make it of.
    """
    found: dict[str, Pairs] = {name: split.pairs for name, split in run.splits.items()}
    for name in ("test", "valid"):
        if name not in found:
            pairs = found["train"]
            away = set(range(_HELD_OUT_EVERY - 1, len(pairs), _HELD_OUT_EVERY))
            if not away:
                raise TrainingError(f"{run.config.data}: {len(pairs)} pairs are too few to hold some out as {name}")
            found[name] = PairSubset(pairs, sorted(away))
            found["train"] = PairSubset(pairs, [index for index in range(len(pairs)) if index not in away])
    return found


def spread_out(pairs: Pairs, most: int) -> Pairs:
    """At most `most` pairs (-1: all), spread evenly."""
    if most == -1 or most >= len(pairs):
        return pairs
    return PairSubset(pairs, evenly_spread(len(pairs), most))


def relabel(step_batch: Pairs, labels: str, step: int, seed: int) -> list[Example]:
    """A step batch with its labels as they were given, all swapped, or half of them swapped at random."""
    if labels == "given":
        return list(step_batch)
    if labels == "swapped":
        return [swapped(pair) for pair in step_batch]
    # Half of every batch, not a coin for every pair: at a small budget the coins alone would favour a side. Of an odd
    # number, one more half of the time.
    generator = np.random.default_rng((seed, step))
    half = (len(step_batch) + int(generator.integers(2))) // 2
    chosen = set(generator.permutation(len(step_batch))[:half].tolist())
    return [swapped(pair) if number in chosen else pair for number, pair in enumerate(step_batch)]


def judged_pair(example: Example) -> TokenizedPair:
    """The pair by which a model is judged: of a group its best completion and its worst.

    Raises:
        TrainingError: there are no two that differ.
    """
    if isinstance(example, TokenizedPair):
        return example
    best, worst = best_and_worst(example)
    if example.scores[best] == example.scores[worst]:
        raise TrainingError(
            f"{example.location}: models are compared by what they prefer, and the row has no better and no worse "
            "completion; give valid and test splits of pairs"
        )
    return TokenizedPair(example.prompt_ids, example.completions[best], example.completions[worst], example.location)


def swapped(example: Example) -> Example:
    """A pair with its sides exchanged, a group with its scores and pairs the other way round."""
    if isinstance(example, TokenizedPair):
        margin = None if example.margin is None else -example.margin
        return example._replace(chosen_ids=example.rejected_ids, rejected_ids=example.chosen_ids, margin=margin)
    scores = tuple(1.0 - score if example.labelled else -score for score in example.scores)
    return example._replace(scores=scores, pairs=tuple((worse, better) for better, worse in example.pairs))
