"""The methods of the exercise, and the settings each is tuned over: the same number for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from orpo_mlx.chapter import orpo_training_step
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.step import optimiser_step
from orpo_mlx.types import TokenizedPair

StepResult = dict[str, float]
"""`loss`, and `accuracy`: the share of the batch's pairs whose chosen side had the higher mean log-prob."""


class Setting(NamedTuple):
    """One point of a method's grid."""

    rate: float
    """Learning rate."""
    strength: float | None
    """The value of the method's parameter that is varied; None for a method without one."""


class Contender(NamedTuple):
    """A method that takes part."""

    name: str
    settings: dict[str, Any]
    """Of `TrainingConfig`."""
    strength: str | None
    """The parameter that holds it to the base model, or weighs its terms."""
    strengths: tuple[float, ...]
    likelihood: bool
    """Whether its loss raises the chosen side's likelihood whatever the rejected side is."""
    step: Callable[[Run, Sequence[TokenizedPair], int], StepResult]
    reward: str
    """The method whose reward of a pair is its own; of one that has none of pairs, that with its reward of a
    completion."""

    def config(self, setting: Setting, shared: TrainingConfig, seed: int) -> TrainingConfig:
        """The settings of one of its trainings."""
        own = dict(self.settings)
        if self.strength is not None:
            own[self.strength] = setting.strength
        return dataclasses.replace(shared, learning_rate=setting.rate, seed=seed, **own)


def library_step(run: Run, pairs: Sequence[TokenizedPair], step: int) -> StepResult:
    """One step as `orpo-mlx train` takes it."""
    means = optimiser_step(run, pairs, step).means()
    return {"loss": means["loss"], "accuracy": means["accuracies/mean_logps"]}


def chapter_step(run: Run, pairs: Sequence[TokenizedPair], step: int) -> StepResult:
    """One step by the course chapter's own function."""
    found = orpo_training_step(run.scorer, run.scorer.collate(pairs), run.optimizer)
    return {"loss": found["loss"], "accuracy": found["accuracy"]}


def _contender(
    name: str, strengths: tuple[float, ...], *, likelihood: bool = False, reward: str | None = None
) -> Contender:
    strength = "beta" if strengths else None
    return Contender(name, {"method": name}, strength, strengths, likelihood, library_step, reward or name)


# A factor of about three apart, around the values that earlier, smaller grids chose: docs/comparison.md says so.
CONTENDERS = (
    _contender("orpo", (0.1, 0.3, 1.0, 3.0, 10.0, 30.0), likelihood=True),
    _contender("orpo_style", (0.05, 0.1, 0.5, 1.0, 3.0, 10.0)),
    _contender("dpo", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    _contender("simpo", (0.2, 0.5, 2.0, 5.0, 10.0, 20.0)),
    _contender("ipo", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    _contender("cpo", (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), likelihood=True),
    _contender("sft", (), likelihood=True),
    _contender("robust", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    # Of a completion both have β times its log ratio.
    _contender("kto", (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), reward="dpo"),
    # Its function has no argument for β: it is always 0.5.
    Contender("chapter's step", {"method": "orpo_style"}, None, (), False, chapter_step, "orpo_style"),
)

BASELINE = "dpo"
"""The method that the others are tested against."""
LIKELIHOOD_ALONE = "sft"
"""The method that is nothing but a likelihood term."""
SAME_LOSS = ("chapter's step", "orpo_style")
"""Two contenders that have one loss: what parts them is tuning and chance alone."""


def grid(contender: Contender, rates: Sequence[float], size: int) -> list[Setting]:
    """`size` settings: learning rates times strengths, or, without a strength, that many rates over the same range."""
    if contender.strength is None:
        return [Setting(float(f"{rate:.3g}"), None) for rate in np.geomspace(rates[0], rates[-1], size)]
    # Of a smaller grid than there are strengths, the middle ones.
    count = size // len(rates)
    first = (len(contender.strengths) - count + 1) // 2
    return [Setting(rate, strength) for rate in rates for strength in contender.strengths[first : first + count]]
