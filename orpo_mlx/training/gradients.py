"""The gradient of a step batch, whatever the micro-batches it is cut into."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from orpo_mlx.data.batching import count_pairs, micro_batches, sequence_tokens
from orpo_mlx.engine.pair_scorer import join_logps, pair_logps
from orpo_mlx.engine.segmented_backward import Gradients
from orpo_mlx.losses.metrics import METRICS, MetricMeans, pair_metrics
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.training.reference import with_reference
from orpo_mlx.training.row_values import row_values, with_row_values
from orpo_mlx.training.run import Run
from orpo_mlx.training.step_functions import LossGradient, MicroBatch, differentiated
from orpo_mlx.types import Example


class StepGradient(NamedTuple):
    """What an optimiser step begins with. Everything is evaluated."""

    gradients: Gradients
    """Of the mean loss over the step's pairs."""
    norm: float
    """Euclidean, over all trained parameters."""
    means: MetricMeans


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
    couples = run.method.couples_pairs and (len(parts) > 1 or ranks.size > 1)
    loss_gradients, means_of_step = _loss_gradients(run, step_batch, parts) if couples else ([None] * len(parts), None)
    # On a GPU the host builds the next micro-batch while the device works on this one.
    evaluate = mx.async_eval if run.scorer.profile.compiled else mx.eval
    gradients: Gradients = {}
    values: list[mx.array] = []
    for number, (pairs, loss_gradient) in enumerate(zip(parts, loss_gradients, strict=True)):
        if number:
            evaluate(values, gradients)
        inputs = micro_batch_inputs(run, step_batch, pairs, loss_gradient)
        _, metrics, gradients = run.functions.add_micro_batch(inputs, gradients)
        values.append(metrics)
    if ranks.size > 1:
        gradients = _sum_of_all_ranks(run, gradients)
    norm = run.functions.norm(gradients)
    mx.eval(values, gradients, norm)
    means = MetricMeans()
    for metrics in values:
        means.add(dict(zip(METRICS, np.array(metrics), strict=True)))
    return StepGradient(gradients, norm.item(), means_of_step or _means_of_all_ranks(run, means))


def micro_batch_inputs(
    run: Run,
    step_batch: Sequence[Example],
    pairs: Sequence[Example],
    loss_gradient: LossGradient | None = None,
) -> MicroBatch:
    """What the gradient of some of a step's pairs depends on."""
    tokens = _nll_tokens_per_pair(run, step_batch)
    batch = run.scorer.collate(pairs, with_prompt=tokens is not None)
    reference = run.reference(pairs, batch) if run.reference else None
    return MicroBatch(
        batch,
        reference,
        row_values(pairs, run.method, weighted=run.weighted),
        mx.array(float(count_pairs(step_batch))),
        None if tokens is None else mx.array(tokens),
        loss_gradient,
    )


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
    run: Run, step_batch: Sequence[Example], parts: Sequence[Sequence[Example]]
) -> tuple[list[LossGradient | None], MetricMeans]:
    """Log-probs of the whole step first, then its loss's gradient towards them, by micro-batch; the step's metrics.

    LoRA dropout, where there is any, is drawn anew in the second pass.
    """
    logps = []
    for pairs in parts:
        inputs = micro_batch_inputs(run, step_batch, pairs)
        tokens = inputs.nll_tokens_per_pair
        wanted = run.method.wanted
        policy = pair_logps(run.scorer, inputs.batch, nll_tokens_per_pair=tokens, gradient=False, wanted=wanted)
        logps.append(with_row_values(with_reference(policy, inputs.reference), inputs.rows))
        mx.eval(logps[-1])
    together = join_logps(logps) if run.ranks.size == 1 else run.ranks.gather_logps(logps)

    def loss(values: dict[str, mx.array]) -> mx.array:
        return run.method.loss(together._replace(**values)).losses.mean()

    towards = mx.grad(loss)(differentiated(together))
    means = MetricMeans()
    means.add(pair_metrics(together, run.method.loss(together)))
    before = sum(count_pairs(run.ranks.share(step_batch, rank)) for rank in range(run.ranks.rank))
    bounds = np.cumsum([before, *map(count_pairs, parts)]).tolist()
    parts_of = [{name: value[a:b] for name, value in towards.items()} for a, b in itertools.pairwise(bounds)]
    return [LossGradient(**part) for part in parts_of], means


def _nll_tokens_per_pair(run: Run, step_batch: Sequence[Example]) -> float | None:
    return sequence_tokens(step_batch) / count_pairs(step_batch) if run.config.nll == "sequence" else None
