"""One optimiser step, the same for every method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from orpo_mlx.errors import HalfAppliedError, NonFiniteError, reason_of
from orpo_mlx.losses.metrics import MetricMeans
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.process_memory import clear_cache_above
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.gradients import StepGradient, micro_batch_inputs, step_gradient
from orpo_mlx.training.steps.step_functions import gradient_norm
from orpo_mlx.types import Example

_SHOWN = 4

# PyTorch's own, so that the same `max_grad_norm` clips alike.
_NORM_FLOOR = 1e-6


def optimiser_step(run: Run, step_batch: Sequence[Example], step: int) -> MetricMeans:
    """One optimiser step on a step batch, run in micro-batches; returns the step's metrics, and `grad_norm`, the
    gradient's norm before `--max-grad-norm`.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; nothing has been applied.
        HalfAppliedError: the step was ended while it was applied.
    """
    found = step_gradient(run, step_batch)
    require_finite(run, step_batch, step, found)
    found.means.add_step({"grad_norm": found.norm, **found.values.metrics()})
    most = run.config.max_grad_norm
    try:
        run.functions.update(found.gradients, 1.0 if most is None else clip_factor(found.norm, most))
        mx.eval(run.loaded.model.trainable_parameters(), run.optimizer.state)
    # Interrupts as well: weights of which only some are updated must never be saved.
    except BaseException as error:
        raise HalfAppliedError(f"step {step}: {reason_of(error)}, while the step was applied") from error
    means = found.means
    if run.method.wanted.running:
        run.rewards.update(means)
    del found  # What is freed after the cache was looked at would be in it all the same.
    clear_cache_above(run.config.clear_cache_threshold)
    return means


def clip_factor(norm: float, most: float) -> float:
    """What gradients of a norm are multiplied by to have at most the norm `most`, as in PyTorch's `clip_grad_norm_`."""
    return min(1.0, most / (norm + _NORM_FLOOR))


def require_finite(run: Run, step_batch: Sequence[Example], step: int, found: StepGradient) -> None:
    """Make sure that a step's metrics and gradient are finite.

    Raises:
        NonFiniteError: they are not; names the step, the norm, the rows, and the weight or gradient it is.
    """
    metrics = found.means.means()
    bad = [key for key, value in metrics.items() if not math.isfinite(value)]
    if math.isfinite(found.norm) and not bad:
        return
    # The weights first: with a bad one every row is bad.
    spoiled = _not_finite(adapter_weights(run.loaded.model))
    rows = [] if spoiled else [pair for pair in step_batch if not _finite_alone(run, step_batch, pair)]
    gradient = _not_finite(found.gradients)
    if spoiled:
        what = f"; the weight {spoiled[0]} is not finite itself{_more(spoiled)}"
    elif gradient and not rows:
        what = f"; the gradient of {gradient[0]} is not finite{_more(gradient)}, with no row that does this alone"
    else:
        what = ""
    other = [key for key in bad if key != "loss"]
    if other and "loss" not in bad:
        what += f"; {other[0]} is {metrics[other[0]]}"
    # Skipped steps are told as well, and what is given already is no advice.
    given = run.config.on_nonfinite == "skip"
    advice = "or look at those rows" if given else "look at those rows, or skip such steps with `on_nonfinite=skip`"
    places = ", ".join(pair.location for pair in (rows or step_batch)[:_SHOWN])
    raise NonFiniteError(
        f"step {step}: the loss is {metrics['loss']} and the gradient's norm {found.norm} on {places}"
        f"{_more(rows or step_batch, _SHOWN)}{what}, so the step was not applied: "
        f"lower `learning_rate`{' ' if given else ', '}{advice}"
    )


def _finite_alone(run: Run, step_batch: Sequence[Example], pair: Example) -> bool:
    """Whether a pair's own share of the step's loss, its metrics and its gradient are finite."""
    loss, metrics, gradients = run.functions.micro_batch(micro_batch_inputs(run, step_batch, [pair]))
    return all(mx.isfinite(value).all().item() for value in (loss, gradient_norm(gradients), metrics))


def _not_finite(arrays: Mapping[str, mx.array]) -> list[str]:
    return [name for name, array in arrays.items() if not mx.isfinite(array).all().item()]


def _more(things: Sequence[Any], shown: int = 1) -> str:
    return f" (and {len(things) - shown} more)" if len(things) > shown else ""
