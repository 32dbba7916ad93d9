"""One optimiser step, the same for every method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from orpo_mlx.errors import HalfAppliedError, NonFiniteError, reason_of
from orpo_mlx.losses.metrics import MetricMeans
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.process_memory import clear_cache_above
from orpo_mlx.training.gradients import batch_gradient, gradient_norm, window_gradient
from orpo_mlx.training.run import Run
from orpo_mlx.types import TokenizedPair

_SHOWN = 4


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
        raise HalfAppliedError(f"step {step}: {reason_of(error)}, while the step was applied") from error
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


def require_finite(
    run: Run, window: Sequence[TokenizedPair], step: int, means: MetricMeans, gradients: dict[str, Any], norm: float
) -> None:
    """Make sure that a window's metrics and gradient are finite.

    Raises:
        NonFiniteError: they are not; names the step, the norm, the rows, and the weight or gradient it is.
    """
    metrics = means.means()
    bad = [key for key, value in metrics.items() if not math.isfinite(value)]
    if math.isfinite(norm) and not bad:
        return
    # The weights first: with a bad one every row is bad.
    spoiled = _not_finite(adapter_weights(run.loaded.model))
    rows = [] if spoiled else [pair for pair in window if not _finite_alone(run, window, pair)]
    gradient = _not_finite(dict(tree_flatten(gradients)))
    if spoiled:
        what = f"; the weight {spoiled[0]} is not finite itself{_more(spoiled)}"
    elif gradient and not rows:
        what = f"; the gradient of {gradient[0]} is not finite{_more(gradient)}, with no row that does this alone"
    else:
        what = ""
    other = [key for key in bad if key != "loss"]
    if other and "loss" not in bad:
        what += f"; {other[0]} is {metrics[other[0]]}"
    places = ", ".join(pair.location for pair in (rows or window)[:_SHOWN])
    raise NonFiniteError(
        f"step {step}: the loss is {metrics['loss']} and the gradient's norm {norm} on {places}"
        f"{_more(rows or window, _SHOWN)}{what}, so the step was not applied: "
        "lower --learning-rate, look at those rows, or pass such steps over with --on-nonfinite skip"
    )


def _finite_alone(run: Run, window: Sequence[TokenizedPair], pair: TokenizedPair) -> bool:
    """Whether a pair's own share of the window's loss, its metrics and its gradient are finite."""
    loss, metrics, gradients = batch_gradient(run, window, [pair])
    return all(mx.isfinite(value).all().item() for value in (loss, gradient_norm(gradients), *metrics.values()))


def _not_finite(arrays: Mapping[str, mx.array]) -> list[str]:
    return [name for name, array in arrays.items() if not mx.isfinite(array).all().item()]


def _more(things: Sequence[Any], shown: int = 1) -> str:
    return f" (and {len(things) - shown} more)" if len(things) > shown else ""
