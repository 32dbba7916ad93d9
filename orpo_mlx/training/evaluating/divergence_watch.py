"""Alarms for runs that go wrong while every number is finite."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

# Long enough that chance does not do it: with an accuracy of 0.9 a batch of one, forty times right has a probability of
# 1.5 %.
SPAN = 40
"""Steps that are looked at together."""
# Four means in a row that fall: a steady fall, and no single jump.
_BLOCKS = 4

FALLING = (
    "Rewards of both sides have been falling for {span} steps: the model is unlearning the chosen answers as well; "
    "a lower `learning_rate` or other pairs may help, and, where the method has no likelihood term, one that has "
    "(orpo, cpo, or a sum with sft)."
)
ALWAYS_RIGHT = (
    "The reward's accuracy has been 1 for {span} steps: these pairs have nothing left to teach, and training on moves "
    "the model for nothing."
)
ALWAYS_WRONG = (
    "The reward's accuracy has been 0 for {span} steps: look whether chosen and rejected are the wrong way round, and "
    "whether `learning_rate` is far too low or far too high."
)


class _Seen(NamedTuple):
    chosen: float
    rejected: float
    accuracy: float


class DivergenceWatch:
    """Looks at the last `SPAN` steps' mean rewards and accuracy, and has a sentence for each trouble, once."""

    def __init__(self) -> None:
        self._seen: deque[_Seen] = deque(maxlen=SPAN)
        self._said: list[str] = []

    def add(self, metrics: Mapping[str, float]) -> list[str]:
        """Take in one step's metrics; what there is to say now."""
        # A step of good or bad completions alone has not both rewards, and tells nothing of how they move apart.
        if not {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            return []
        self._seen.append(_Seen(metrics["rewards/chosen"], metrics["rewards/rejected"], metrics["rewards/accuracies"]))
        if len(self._seen) < SPAN:
            return []
        accuracies = {seen.accuracy for seen in self._seen}
        troubles = {
            FALLING: all(_falls([seen[side] for seen in self._seen]) for side in (0, 1)),
            ALWAYS_RIGHT: accuracies == {1.0},
            ALWAYS_WRONG: accuracies == {0.0},
        }
        new = [text for text, holds in troubles.items() if holds and text not in self._said]
        self._said += new
        return [text.format(span=SPAN) for text in new]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {"seen": [list(seen) for seen in self._seen], "said": self._said}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DivergenceWatch:
        """What `to_json` gave; KeyError, TypeError or ValueError where it is something else."""
        watch = cls()
        watch._seen.extend(_Seen(*(float(number) for number in seen)) for seen in value["seen"])
        watch._said = [str(text) for text in value["said"]]
        return watch


def _falls(values: list[float]) -> bool:
    """Whether the mean over each quarter is below that before, and the whole fall larger than one step's spread."""
    # Steps are noisy: quarters average the noise out, and a fall within it is none.
    size = len(values) // _BLOCKS
    blocks = [values[start : start + size] for start in range(0, len(values), size)]
    means = [math.fsum(block) / size for block in blocks]
    squares = [(value - mean) ** 2 for block, mean in zip(blocks, means, strict=True) for value in block]
    spread = math.sqrt(math.fsum(squares) / len(squares))
    return all(later < earlier for earlier, later in itertools.pairwise(means)) and (means[0] - means[-1] > spread)
