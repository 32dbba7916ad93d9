"""One optimiser step, the same for every method."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from orpo_mlx.errors import TrainingError
from orpo_mlx.gradients import gradient_norm, window_gradient
from orpo_mlx.metrics import MetricMeans
from orpo_mlx.prepare import Run
from orpo_mlx.types import TokenizedPair


def optimiser_step(run: Run, window: Sequence[TokenizedPair], step: int) -> MetricMeans:
    """One optimiser step on a window of pairs, taken as batches of `batch_size`; returns the window's metrics.

    Raises:
        TrainingError: the loss or the gradient is not finite; nothing has been applied.
    """
    model = run.loaded.model
    means, gradients = window_gradient(run, window)
    loss, norm = means.means()["loss"], float(gradient_norm(gradients))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        places = ", ".join(pair.place for pair in window[:4])
        raise TrainingError(
            f"step {step}: the loss is {loss} and the gradient's norm {norm} on {places}, so the step was not applied: "
            "lower --learning-rate, or look at those rows"
        )
    run.optimizer.update(model, gradients)
    mx.eval(model.trainable_parameters(), run.optimizer.state)
    return means
