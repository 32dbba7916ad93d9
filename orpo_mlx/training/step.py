"""One optimiser step, the same for every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from orpo_mlx.errors import HalfAppliedError
from orpo_mlx.losses.metrics import MetricMeans
from orpo_mlx.process_memory import clear_cache_above
from orpo_mlx.training.finite import require_finite
from orpo_mlx.training.gradients import gradient_norm, window_gradient
from orpo_mlx.training.prepare import Run
from orpo_mlx.types import TokenizedPair

_NORM_FLOOR = 1e-6


def optimiser_step(run: Run, window: Sequence[TokenizedPair], step: int) -> MetricMeans:
    """One optimiser step on a window of pairs, taken as batches of `batch_size`; returns the window's metrics, and
    `grad_norm`, the gradient's norm before `--max-grad-norm`.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; nothing has been applied.
        HalfAppliedError: the step was ended while it was applied.
    """
    model = run.loaded.model
    means, gradients = window_gradient(run, window)
    norm = float(gradient_norm(gradients))
    require_finite(run, window, step, means, gradients, norm)
    means.add_step({"grad_norm": norm})
    if run.config.max_grad_norm is not None:
        gradients = clipped(gradients, norm, run.config.max_grad_norm)
    try:
        run.optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), run.optimizer.state)
    except BaseException as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise HalfAppliedError(f"step {step}: {reason}, while the step was applied") from error
    del gradients  # What is freed after the cache was looked at would be in it all the same.
    clear_cache_above(run.config.clear_cache_threshold)
    return means


def clipped(gradients: dict[str, Any], norm: float, most: float) -> dict[str, Any]:
    """`gradients` of a norm, scaled down to the norm `most` where it is larger, as PyTorch's `clip_grad_norm_` does."""
    factor = most / (norm + _NORM_FLOOR)
    if factor >= 1:
        return gradients
    scaled: dict[str, Any] = tree_map(lambda gradient: gradient * factor, gradients)
    return scaled
