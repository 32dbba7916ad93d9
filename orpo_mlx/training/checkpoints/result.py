"""What a run comes to, for those who start it from Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from orpo_mlx.training.checkpoints.progress import Best, Held


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """A run that has come to its end. Of a resumed run, counts and seconds are those of all its parts."""

    adapter_path: Path
    """Holds adapters, metrics, report, model card and checkpoints."""
    steps: int
    """Optimiser steps, those passed over included."""
    skipped: int
    """Steps passed over because a number in them was not finite, with `on_nonfinite="skip"`."""
    before: Held
    """Held-out metrics before the first step: by split (`valid`, `test`), then by name (`rewards/accuracies`)."""
    after: Held
    """Held-out metrics after the last step; a split that is not there, or not asked for, has none."""
    best: Best | None
    """Step and loss of the best evaluation, with `save_best`."""
    trained_tokens: int
    """Tokens of prompts and completions in the steps."""
    training_seconds: float
    """Spent in the steps, without evaluation, loading and saving."""
    peak_memory_gib: float
    """MLX's peak since training began, in this process."""
