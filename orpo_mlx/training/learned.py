"""Whether a run has learned anything that holds beyond its own pairs, and the one thing to try where it has not."""

from __future__ import annotations

import math

from orpo_mlx.errors import DataError
from orpo_mlx.reporting.metrics_log import read_run
from orpo_mlx.training.checkpoints.progress import TrainingResult
from orpo_mlx.training.data_order import evaluation_pairs
from orpo_mlx.training.run import Run

_ACCURACY = "rewards/accuracies"
# Of fewer pairs a coin gets all right once in twenty runs or so.
_FEWEST = 8
# The 95 % point of a normal distribution.
_POINT = 1.645
# Ranked right while training: below, the pairs themselves are not learned yet.
_LEARNED = 0.75
_FASTER, _HIGHEST = 3, 1e-3


def chance_bound(pairs: int) -> float:
    """The share of `pairs` ranked right that a coin exceeds in 5 % of runs, by the normal approximation."""
    return 0.5 + _POINT * 0.5 / math.sqrt(pairs)


def doubt(run: Run, result: TrainingResult) -> str | None:
    """A sentence where held-out pairs are ranked no better than by chance; None where they are, or cannot say.

    The test split is asked, or without one the valid split, by the method's own reward.
    """
    held_out = evaluation_pairs(run)
    name = next((name for name in ("test", "valid") if _ACCURACY in result.after.get(name, {})), None)
    if name is None or run.method.one_sided or len(held_out.get(name, ())) < _FEWEST:
        return None
    count, accuracy = len(held_out[name]), result.after[name][_ACCURACY]
    if accuracy > chance_bound(count):
        return None
    return (
        f"Nothing was learned that holds for other pairs: of {count} {name} pairs {accuracy:.0%} are ranked right, and "
        f"a coin gets up to {chance_bound(count):.0%}. {advice(run)}"
    )


def advice(run: Run) -> str:
    """The one thing to try."""
    trained = _accuracy_at_the_end(run)
    if trained is None or trained >= _LEARNED:
        return "Its own pairs are ranked right, so what would help is more pairs, or more alike."
    own = f"Nor are its own ({trained:.0%} at the end)"
    faster = run.config.learning_rate * _FASTER
    if faster <= _HIGHEST:
        return f"{own}: try `learning_rate={faster:g}`."
    return f"{own}: look at them by orpo-mlx inspect, for chosen and rejected may be the wrong way round."


def _accuracy_at_the_end(run: Run) -> float | None:
    """Of the last report of the training."""
    try:
        points = read_run(run.folder).points("train", _ACCURACY)
    except DataError:
        return None
    return points[-1][1] if points else None
