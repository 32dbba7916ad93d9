"""What was unlearnt: items of a task that were answered right before and after, kept, gained and lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from orpo_mlx.judging.intervals import wilson


class Regression(NamedTuple):
    """A task before and after, item by item."""

    kept: int
    """Right before and after."""
    gained: int
    """Wrong before, right after."""
    lost: int
    """Right before, wrong after."""
    missed: int
    """Wrong before and after."""
    p_value: float
    """Of McNemar's exact test: how likely it is that gains and losses lie at least so far apart by chance."""

    @property
    def items(self) -> int:
        return self.kept + self.gained + self.lost + self.missed

    @property
    def before(self) -> float:
        """Accuracy before."""
        return (self.kept + self.lost) / self.items

    @property
    def after(self) -> float:
        """Accuracy after."""
        return (self.kept + self.gained) / self.items


def compare_items(before: Mapping[str, bool], after: Mapping[str, bool]) -> Regression:
    """Items by their names, right or wrong before and after.

    Raises:
        ValueError: the items are not the same, or there are none.
    """
    if before.keys() != after.keys() or not before:
        raise ValueError("a regression needs the same items before and after, and at least one.")
    both = [(before[name], after[name]) for name in before]
    gained, lost = both.count((False, True)), both.count((True, False))
    return Regression(both.count((True, True)), gained, lost, both.count((False, False)), mcnemar(gained, lost))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test (1947): items that changed are as likely gained as lost, Binomial(n, 1/2)."""
    changed = gained + lost
    if not changed:
        return 1.0
    tail = sum(math.comb(changed, number) for number in range(min(gained, lost) + 1))
    # Where as many are gained as lost, both tails hold the middle, and twice one of them exceeds 1.
    return float(min(1.0, 2 * tail / 2**changed))


def regression_figures(found: Regression) -> dict[str, float | int | list[float]]:
    """A regression as JSON has it."""
    return {
        **found._asdict(),
        "items": found.items,
        "before": found.before,
        "before_interval": list(wilson(found.before, found.items)),
        "after": found.after,
        "after_interval": list(wilson(found.after, found.items)),
    }


def regression_line(task: str, found: Regression) -> str:
    """A regression in a line."""
    return (
        f"{task}: {found.before:.1%} before, {found.after:.1%} after, of {found.items}: {found.kept} kept, "
        f"{found.gained} gained, {found.lost} lost, {found.missed} missed; p {found.p_value:.3f} (McNemar)"
    )
