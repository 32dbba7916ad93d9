"""The gradient of a window of pairs, whatever the batches it is cut into."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from orpo_mlx.data.batching import collate, micro_batches, sequence_tokens
from orpo_mlx.engine.pair_scorer import join_logps, pair_logps
from orpo_mlx.engine.segmented_backward import Gradients
from orpo_mlx.losses.metrics import MetricMeans, pair_metrics
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.training.reference import with_reference
from orpo_mlx.training.run import Run
from orpo_mlx.types import PairLogProbs, States, TokenizedPair


class LossSlope(NamedTuple):
    """A batch's part of the gradient of its window's loss towards log-probs, for losses that couple pairs."""

    chosen: mx.array
    rejected: mx.array
    nll: mx.array

    def times(self, logps: PairLogProbs) -> mx.array:
        """A scalar whose gradient is the window loss's, by the chain rule through the log-probs."""
        return (self.chosen * logps.chosen + self.rejected * logps.rejected + self.nll * logps.nll).sum()


def window_gradient(run: Run, window: Sequence[TokenizedPair]) -> tuple[MetricMeans, dict[str, Any]]:
    """Metrics of a window, and the gradient of its mean loss over pairs, whatever the batches it is cut into.

    Normalisers are known before the first backward, so that accumulating equals one big batch.
    """
    ranks = run.ranks
    cuts = _cuts(run, ranks.share(window))
    if ranks.size > 1 and run.reference:
        # In the order in which `share` deals them out again: one batch of each rank after the other.
        by_rank = [_cuts(run, ranks.share(window, rank)) for rank in range(ranks.size)]
        run.reference.remember_among(ranks, [cut for turn in zip_longest(*by_rank, fillvalue=[]) for cut in turn])
    couples = run.method.couples_pairs and (len(cuts) > 1 or ranks.size > 1)
    slopes, means_of_window = _loss_slopes(run, window, cuts) if couples else ([None] * len(cuts), None)
    means = MetricMeans()
    gradients: Gradients = {}
    for pairs, slope in zip(cuts, slopes, strict=True):
        loss, metrics, share = batch_gradient(run, window, pairs, slope)
        for name in list(share):
            # One at a time: two whole gradients need not exist at once.
            gradient = share.pop(name)
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        mx.eval(loss, metrics, gradients)
        means.add(metrics)
    if ranks.size > 1:
        gradients, means = _of_all_ranks(run, gradients, means)
    return means_of_window or means, tree_unflatten(list(gradients.items()))


def _cuts(run: Run, pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
    return micro_batches(pairs, run.config.batch_size, run.config.micro_batch_tokens)


def _of_all_ranks(run: Run, gradients: Gradients, means: MetricMeans) -> tuple[Gradients, MetricMeans]:
    """Sums over all ranks; one that had no pair of the window has no gradient yet."""
    weights = adapter_weights(run.loaded.model)
    shares = {name: gradients[name] if name in gradients else mx.zeros_like(weights[name]) for name in weights}
    together = MetricMeans()
    for part in run.ranks.gather(means.to_json()):
        together.merge(MetricMeans.from_json(part))
    return run.ranks.sum(shares), together


def batch_gradient(
    run: Run, window: Sequence[TokenizedPair], pairs: Sequence[TokenizedPair], slope: LossSlope | None = None
) -> tuple[mx.array, dict[str, mx.array], Gradients]:
    """One batch's share of its window's loss, the batch's per-pair metrics, and the share's gradients by flat name."""
    batch = collate(pairs)
    reference = run.reference(pairs, batch) if run.reference else None
    tokens_per_pair = _nll_tokens_per_pair(run, window)

    def share(states: States) -> tuple[mx.array, dict[str, mx.array]]:
        policy = pair_logps(run.scorer, batch, nll_tokens_per_pair=tokens_per_pair, states=states)
        logps = with_reference(policy, reference)
        output = run.method.loss(logps)
        loss = output.losses.sum() / len(window) if slope is None else slope.times(logps)
        return loss, pair_metrics(logps, output)

    (loss, metrics), gradients = run.memory.value_and_grad(batch, share)
    return loss, metrics, gradients


def gradient_norm(gradients: dict[str, Any]) -> mx.array:
    """Euclidean norm over all trained parameters, in float32; not finite where any entry is not."""
    squares = [value.astype(mx.float32).square().sum() for value in dict(tree_flatten(gradients)).values()]
    return mx.sqrt(mx.stack(squares).sum())


def _loss_slopes(
    run: Run, window: Sequence[TokenizedPair], cuts: Sequence[Sequence[TokenizedPair]]
) -> tuple[list[LossSlope | None], MetricMeans]:
    """Log-probs of the whole window first, then its loss's gradient towards them, cut up again; the window's metrics.

    LoRA dropout, where there is any, is drawn anew in the second pass.
    """
    parts = []
    for pairs in cuts:
        batch = collate(pairs)
        logps = pair_logps(run.scorer, batch, nll_tokens_per_pair=_nll_tokens_per_pair(run, window), gradient=False)
        parts.append(with_reference(logps, run.reference(pairs, batch) if run.reference else None))
        mx.eval(parts[-1])
    together = join_logps(parts) if run.ranks.size == 1 else run.ranks.gather_logps(parts)

    def loss(chosen: mx.array, rejected: mx.array, nll: mx.array) -> mx.array:
        return run.method.loss(together._replace(chosen=chosen, rejected=rejected, nll=nll)).losses.mean()

    slopes = mx.grad(loss, argnums=(0, 1, 2))(together.chosen, together.rejected, together.nll)
    means = MetricMeans()
    means.add(pair_metrics(together, run.method.loss(together)))
    before = sum(len(run.ranks.share(window, rank)) for rank in range(run.ranks.rank))
    bounds = np.cumsum([before, *map(len, cuts)]).tolist()
    chosen, rejected, nll = slopes
    return [LossSlope(chosen[a:b], rejected[a:b], nll[a:b]) for a, b in itertools.pairwise(bounds)], means


def _nll_tokens_per_pair(run: Run, window: Sequence[TokenizedPair]) -> float | None:
    return sequence_tokens(window) / len(window) if run.config.nll == "sequence" else None
