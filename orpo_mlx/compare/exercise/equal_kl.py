"""A training at given distances from the base model: what it gained when its KL was this much."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from orpo_mlx.compare.exercise.task import PerPrompt

Looks = Callable[[int], PerPrompt]
"""Measures of a training on the test prompts at one of its looks, by place; the first, 0, is of the base model."""


def at_targets(
    targets: Sequence[float], kls: Sequence[float], steps: Sequence[int], look: Looks
) -> dict[str, dict[str, Any]]:
    """`step` and `gold` (a value for each prompt) at each target that the training reached.

    Between the two looks around a target both are interpolated linearly in √KL: gold grows as √KL for small steps
    away from the base model (to first order it is linear in the change of the logits, and KL quadratic).

    Args:
        targets: nats per reply, rising.
        kls: KL at each look as estimated on other prompts: where to begin, so that few looks need be measured.
        steps: of the looks.
        look: measures; asked for few places, each perhaps more than once.
    """

    def kl(place: int) -> float:
        return statistics.fmean(look(place)["kl"])

    found = {}
    for target in targets:
        place = crossing(target, kls, kl)
        if place is None:
            continue
        low, high = (math.sqrt(max(0.0, kl(each))) for each in (place - 1, place))
        share = (math.sqrt(target) - low) / (high - low)
        golds = zip(look(place - 1)["gold"], look(place)["gold"], strict=True)
        found[f"{target:g}"] = {
            "step": steps[place - 1] + share * (steps[place] - steps[place - 1]),
            "gold": [before + share * (after - before) for before, after in golds],
        }
    return found


def crossing(target: float, kls: Sequence[float], kl: Callable[[int], float]) -> int | None:
    """The place of a look at which `kl` is at least `target`, and below it one look earlier; None if it never is."""
    if len(kls) < 2:
        return None
    place = next((place for place, each in enumerate(kls) if place and each >= target), len(kls) - 1)
    while place > 1 and kl(place - 1) >= target:
        place -= 1
    while kl(place) < target:
        place += 1
        if place == len(kls):
            return None
    return place
