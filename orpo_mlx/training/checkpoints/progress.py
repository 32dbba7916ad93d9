"""How far a run has come: everything that changes from step to step besides arrays and random numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.losses.metrics import MetricMeans
from orpo_mlx.training.evaluating.divergence_watch import DivergenceWatch
from orpo_mlx.training.evaluating.patience import Patience
from orpo_mlx.types import Reply

EvalMetrics = dict[str, dict[str, float]]
"""Means over the pairs of each evaluated split: by split (`valid`, `test`), then by metric."""


class Best(NamedTuple):
    """The best evaluation so far: of the lowest validation loss, or of the highest win rate."""

    step: int
    loss: float | None
    """None where the best is the best by win rate; so is the next where it is not."""
    win_rate: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether there is a number to compare."""
        return math.isfinite(self._rank)

    def is_better_than(self, other: Best) -> bool:
        """Whether its loss is lower, or its win rate higher, or what is looked at is another: then it is begun anew."""
        return (self.win_rate is None) != (other.win_rate is None) or self._rank < other._rank

    @property
    def _rank(self) -> float:
        """The lower the better."""
        if self.win_rate is not None:
            return -self.win_rate
        return math.nan if self.loss is None else self.loss


# Keeps a rate finite where the clock did not move.
_SHORTEST_S = 1e-9


@dataclasses.dataclass
class Progress:
    """The state of a run between two steps."""

    step: int = 0
    """Steps done, those skipped included."""
    reported: int = 0
    """The step of the last report on training."""
    means: MetricMeans = dataclasses.field(default_factory=MetricMeans)
    """Of the steps since then; so are the next two."""
    pair_tokens: int = 0
    seconds: float = 0.0
    trained_tokens: int = 0
    """Of prompts and completions, since the run began; so is the next."""
    training_seconds: float = 0.0
    """Spent in steps."""
    skipped: int = 0
    """Steps skipped since the run began, because a number in them was not finite."""
    best: Best | None = None
    before: EvalMetrics = dataclasses.field(default_factory=dict)
    """Metrics of the held-out splits before the first step."""
    replies_before: list[Reply] = dataclasses.field(default_factory=list)
    resumed_at: list[int] = dataclasses.field(default_factory=list)
    """Steps at which the run was taken up again."""
    watch: DivergenceWatch = dataclasses.field(default_factory=DivergenceWatch)
    patience: Patience = Patience()
    out_of_patience: bool = False
    """Whether the run has ended before its last step because it no longer got better."""

    def validated(self, metrics: Mapping[str, float], config: TrainingConfig) -> str:
        """Take in a validation's metrics; why the run ends, where there have been as many as `patience` says without a
        better one, as text, and empty elsewhere."""
        if config.patience is None:
            return ""
        self.patience = self.patience.after(self.step, metrics, config.patience_on)
        _, best, waited, _ = self.patience
        self.out_of_patience = self.patience.is_over(config)
        said = f"{waited} validations in a row were no better than {config.patience_on} {best:.4f}"
        return f"{said} (`patience={config.patience}`)" if self.out_of_patience else ""

    @property
    def tokens_per_s(self) -> float:
        """Pair tokens per second of the steps since the last report."""
        return self.pair_tokens / max(self.seconds, _SHORTEST_S)

    def start_report(self) -> None:
        """Begin new means after a report."""
        self.reported = self.step
        self.means = MetricMeans()
        self.pair_tokens = 0
        self.seconds = 0.0

    def to_json(self) -> dict[str, Any]:
        """All of it; JSON keeps every bit of a finite float64."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "means": self.means.to_json(),
            # JSON has no NaN; a held-out metric that was none is null, as in metrics.jsonl.
            "before": {
                split: {key: number if math.isfinite(number) else None for key, number in metrics.items()}
                for split, metrics in self.before.items()
            },
            "best": self.best and self.best._asdict(),
            "replies_before": [reply._asdict() for reply in self.replies_before],
            "watch": self.watch.to_json(),
            "patience": self.patience._asdict(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progress:
        """What `to_json` gave; KeyError, TypeError, ValueError or AttributeError where it is something else."""
        best = value["best"]
        counts = {name: int(value[name]) for name in ("step", "reported", "pair_tokens", "skipped")}
        if min(counts.values()) < 0:
            raise ValueError("a negative count")
        return cls(
            **counts,
            # Checkpoints of earlier versions do not have these two.
            trained_tokens=int(value.get("trained_tokens", 0)),
            training_seconds=float(value.get("training_seconds", 0.0)),
            means=MetricMeans.from_json(value["means"]),
            seconds=float(value["seconds"]),
            best=None if best is None else _best(best),
            before={
                str(split): {str(key): math.nan if number is None else float(number) for key, number in metrics.items()}
                for split, metrics in value["before"].items()
            },
            replies_before=[Reply(str(r["prompt"]), str(r["text"]), int(r["tokens"])) for r in value["replies_before"]],
            resumed_at=[int(step) for step in value["resumed_at"]],
            watch=DivergenceWatch.from_json(value["watch"]),
            # Nor these two.
            patience=Patience.from_json(value["patience"]) if "patience" in value else Patience(),
            out_of_patience=bool(value.get("out_of_patience", False)),
        )


def _best(value: Mapping[str, Any]) -> Best:
    # Checkpoints of earlier versions know of losses alone.
    loss, rate = value["loss"], value.get("win_rate")
    return Best(int(value["step"]), None if loss is None else float(loss), None if rate is None else float(rate))


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """A run that has come to its end. Of a resumed run, counts and seconds are those of all its parts."""

    adapter_path: Path
    """Holds adapters, metrics, report, model card and checkpoints."""
    steps: int
    """Optimiser steps, those skipped included."""
    skipped: int
    """Steps skipped because a number in them was not finite, with `on_nonfinite="skip"`."""
    before: EvalMetrics
    """Held-out metrics before the first step: by split (`valid`, `test`), then by name (`rewards/accuracies`)."""
    after: EvalMetrics
    """Held-out metrics after the last step; a split that is not there, or not asked for, has none."""
    best: Best | None
    """Step and loss, or win rate, of the best evaluation, with `save_best`."""
    trained_tokens: int
    """Tokens of prompts and completions in the steps."""
    training_seconds: float
    """Spent in the steps, without evaluation, loading and saving."""
    peak_memory_gib: float
    """MLX's peak since training began, in this process."""
