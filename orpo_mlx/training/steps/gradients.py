"""The gradient of a step batch, whatever the micro-batches it is cut into."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from orpo_mlx.data.batching import count_pairs, micro_batches, row_lengths, sequence_tokens, two_sided
from orpo_mlx.engine.pair_scorer import join_logps, log_probs
from orpo_mlx.engine.segmented_backward import Gradients
from orpo_mlx.losses.metrics import MetricMeans, metric_array
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.training.references.reference import with_reference
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.row_values import row_values, with_row_values
from orpo_mlx.training.steps.step_functions import BalanceShare, LossGradient, MicroBatch, differentiated
from orpo_mlx.training.steps.step_values import StepValues, kl_estimate, mismatched_batches, with_step_values
from orpo_mlx.types import Example


class StepGradient(NamedTuple):
    """What an optimiser step begins with. Everything is evaluated."""

    gradients: Gradients
    """Of the mean loss over the step's pairs."""
    norm: float
    """Euclidean, over all trained parameters."""
    means: MetricMeans
    values: StepValues


def step_gradient(run: Run, step_batch: Sequence[Example]) -> StepGradient:
    """The gradient of the mean loss over a step's pairs, whatever the micro-batches they are run in.

    Normalisers are known before the first backward, so that accumulating equals one big batch.
    """
    ranks = run.ranks
    parts = _micro_batches(run, ranks.share(step_batch))
    if ranks.size > 1 and run.reference:
        # In the order in which `share` deals them out again: one batch of each rank after the other.
        by_rank = [_micro_batches(run, ranks.share(step_batch, rank)) for rank in range(ranks.size)]
        run.reference.remember_among(ranks, [part for turn in zip_longest(*by_rank, fillvalue=[]) for part in turn])
    values = step_values(run, step_batch)
    loss_gradients: list[LossGradient | None] = [None] * len(parts)
    means_of_step = None
    if run.method.couples_pairs and (len(parts) > 1 or ranks.size > 1):
        loss_gradients, means_of_step = _loss_gradients(run, step_batch, parts, values)
    # On a GPU the host builds the next micro-batch while the device works on this one.
    evaluate = mx.async_eval if run.scorer.profile.compiled else mx.eval
    gradients: Gradients = {}
    metrics_of: list[mx.array] = []
    # All of them first: a reference log-prob that is not known yet is waited for, and with it what the device works on.
    inputs_of = [
        micro_batch_inputs(run, step_batch, pairs, loss_gradient, values)
        for pairs, loss_gradient in zip(parts, loss_gradients, strict=True)
    ]
    for number, inputs in enumerate(inputs_of):
        if number:
            evaluate(metrics_of, gradients)
        _, metrics, gradients = run.functions.add_micro_batch(inputs, gradients)
        metrics_of.append(metrics)
    if ranks.size > 1:
        gradients = _sum_of_all_ranks(run, gradients)
    norm = run.functions.norm(gradients)
    mx.eval(metrics_of, gradients, norm)
    means = MetricMeans()
    for metrics, pairs in zip(metrics_of, parts, strict=True):
        means.add_array(np.array(metrics), None if run.method.wanted.groups else two_sided(pairs))
    # Those that came with the loss gradients are of the whole step already, of all ranks.
    return StepGradient(gradients, norm.item(), means_of_step or _means_of_all_ranks(run, means), values)


def step_values(run: Run, step_batch: Sequence[Example]) -> StepValues:
    """What the method measures the rewards of a whole step from."""
    wanted = run.method.wanted
    kl = None
    if wanted.kl:
        assert run.reference is not None
        config = run.config
        batches = mismatched_batches(
            step_batch, run.max_seq_length, config.batch_size, config.micro_batch_tokens, run.scorer.layout
        )
        kl = kl_estimate(run.scorer, run.reference, batches, run.ranks)
    return StepValues(kl, run.rewards.array() if wanted.running else None)


def micro_batch_inputs(
    run: Run,
    step_batch: Sequence[Example],
    pairs: Sequence[Example],
    loss_gradient: LossGradient | None = None,
    values: StepValues | None = None,
) -> MicroBatch:
    """What the gradient of some of a step's pairs depends on; `values` are worked out where they are not at hand."""
    tokens = _nll_tokens_per_pair(run, step_batch)
    batch = run.scorer.collate(pairs, with_prompt=tokens is not None, whole_groups=run.method.wanted.groups)
    reference = run.reference.values(pairs, batch) if run.reference else None
    return MicroBatch(
        batch,
        reference,
        row_values(pairs, run.method, weighted=run.weighted),
        mx.array(float(run.method.count(step_batch))),
        None if tokens is None else mx.array(tokens),
        loss_gradient,
        step_values(run, step_batch) if values is None else values,
        _balance_share(run, step_batch, pairs),
    )


def _balance_share(run: Run, step_batch: Sequence[Example], pairs: Sequence[Example]) -> BalanceShare | None:
    if run.scorer.routers is None:
        return None
    factor = run.config.router_aux_loss_coef * len(pairs) / len(step_batch)
    return BalanceShare(mx.array(factor), tuple(map(mx.array, row_lengths(pairs, run.scorer.layout))))


def _micro_batches(run: Run, pairs: Sequence[Example]) -> list[list[Example]]:
    return micro_batches(pairs, run.config.batch_size, run.config.micro_batch_tokens, run.scorer.layout)


def _sum_of_all_ranks(run: Run, gradients: Gradients) -> Gradients:
    """Gradients added over all ranks; one that had no pair of the step has none yet."""
    weights = adapter_weights(run.loaded.model)
    shares = {name: gradients[name] if name in gradients else mx.zeros_like(weights[name]) for name in weights}
    return run.ranks.sum(shares)


def _means_of_all_ranks(run: Run, means: MetricMeans) -> MetricMeans:
    if run.ranks.size == 1:
        return means
    together = MetricMeans()
    for part in run.ranks.gather(means.to_json()):
        together.merge(MetricMeans.from_json(part))
    return together


def _loss_gradients(
    run: Run, step_batch: Sequence[Example], parts: Sequence[Sequence[Example]], values: StepValues
) -> tuple[list[LossGradient | None], MetricMeans]:
    """Log-probs of the whole step first, then its loss's gradient towards them, by micro-batch; the step's metrics.

    LoRA dropout, where there is any, is drawn anew in the second pass.
    """
    logps = []
    for pairs in parts:
        inputs = micro_batch_inputs(run, step_batch, pairs, values=values)
        tokens = inputs.nll_tokens_per_pair
        wanted = run.method.wanted
        policy = log_probs(run.scorer, inputs.batch, nll_tokens_per_pair=tokens, gradient=False, wanted=wanted)
        logps.append(with_row_values(with_reference(policy, inputs.reference), inputs.rows))
        # One by one: all graphs evaluated together at the end could hold the activations of several micro-batches.
        mx.eval(logps[-1])
    together = with_step_values(join_logps(logps) if run.ranks.size == 1 else run.ranks.gather_logps(logps), values)
    count = float(run.method.count(step_batch))

    def loss(values: dict[str, mx.array]) -> mx.array:
        losses: mx.array = run.method.loss(together._replace(**values)).losses
        # Of groups there are places without a completion.
        return losses.mean() if losses.ndim == 1 else losses.sum() / count

    towards = mx.grad(loss)(differentiated(together))
    means = MetricMeans()
    means.add_array(np.array(metric_array(together, run.method.loss(together))))
    rows_of = len if run.method.wanted.groups else count_pairs
    before = sum(rows_of(run.ranks.share(step_batch, rank)) for rank in range(run.ranks.rank))
    bounds = itertools.pairwise(np.cumsum([before, *map(rows_of, parts)]).tolist())
    parts_of = [
        {name: _rows(value, a, b, part[0]) for name, value in towards.items()}
        for part, (a, b) in zip(parts, bounds, strict=True)
    ]
    return [LossGradient(**part) for part in parts_of], means


def _rows(values: mx.array, first: int, end: int, example: Example) -> mx.array:
    """Rows [first, end) of (P,) values, or of (B, K) ones those of as many completions as `example` has."""
    return values[first:end] if values.ndim == 1 else values[first:end, : len(example.completions)]


def _nll_tokens_per_pair(run: Run, step_batch: Sequence[Example]) -> float | None:
    return sequence_tokens(step_batch) / count_pairs(step_batch) if run.config.nll == "sequence" else None
