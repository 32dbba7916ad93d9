"""Successive halving: the same number of trainings, of the same lengths, for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

from orpo_mlx.compare.exercise.cells import every

Point = TypeVar("Point")


class Round(NamedTuple):
    """One round of the tuning."""

    settings: int
    """How many settings of a method are trained in it."""
    steps: int
    """Optimiser steps of each."""
    seeds: int = 1
    """Trainings of each, which are judged together."""


class Entry(NamedTuple, Generic[Point]):
    """A setting trained in a round, and its worth."""

    round: int
    setting: Point
    score: float


def successive_halving(
    settings: Sequence[Point], rounds: Sequence[Round], score: Callable[[Point, Round], float]
) -> list[Entry[Point]]:
    """Train all settings briefly and the best of them longer (Jamieson & Talwalkar 2016); the last entry won.

    How many are trained, and how long, is set beforehand by `rounds` and not by what they reach, so that methods which
    are given as many settings get the same budget exactly.

    Args:
        settings: as many as the first round takes.
        rounds: falling numbers of settings.
        score: trains a setting as a round has it; higher is better. Of equal scores the earlier setting wins.

    Raises:
        ValueError: not as many settings as the first round takes.
        BusyError: another process is at a score of this round; all others of it were asked for.
    """
    if not rounds or len(settings) != rounds[0].settings:
        raise ValueError(f"halving needs as many settings as its first round, found {len(settings)}.")
    entered: list[Entry[Point]] = []
    alive = list(settings)
    for number, each in enumerate(rounds):
        taken = alive[: each.settings]
        scores = every(partial(score, setting, each) for setting in taken)
        entries = [Entry(number, setting, found) for setting, found in zip(taken, scores, strict=True)]
        # Stable: ties stay in the order of the grid.
        entries.sort(key=lambda entry: -entry.score)
        alive = [entry.setting for entry in entries]
        # The winner of a round last.
        entered += entries[::-1]
    return entered
