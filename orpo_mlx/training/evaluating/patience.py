"""When a run has stopped getting better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from orpo_mlx.config.settings import TrainingConfig

MEASURES = {"loss": ("loss", 1.0), "accuracy": ("rewards/accuracies", -1.0)}
"""By `patience_on`: a validation metric, and 1 where less of it is better, -1 where more is."""


class Patience(NamedTuple):
    """How long a run has waited for a better validation."""

    measure: str = ""
    """What `best` is of; empty before the first validation."""
    best: float = 0.0
    waited: int = 0
    """Validations since the best one."""
    step: int = 0
    """Of the last validation."""

    def after(self, step: int, metrics: Mapping[str, float], measure: str) -> Patience:
        """The state once the metrics of a step's validation are in; another measure begins anew."""
        # A resumed run validates the step of its checkpoint once more.
        if step <= self.step:
            return self
        key, sign = MEASURES[measure]
        value = metrics[key]
        # What is not finite is no better than anything, and nothing to compare with.
        if math.isfinite(value) and (measure != self.measure or sign * value < sign * self.best):
            return Patience(measure, value, 0, step)
        return self._replace(waited=self.waited + 1, step=step)

    def is_over(self, config: TrainingConfig) -> bool:
        """Whether a run has waited for as long as `patience` says, by what `patience_on` says."""
        same = self.measure in ("", config.patience_on)
        return config.patience is not None and same and self.waited >= config.patience

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Patience:
        """What `_asdict` gave; KeyError, TypeError or ValueError where it is something else."""
        return cls(str(value["measure"]), float(value["best"]), int(value["waited"]), int(value["step"]))
