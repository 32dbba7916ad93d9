"""Held-out metrics of a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from orpo_mlx.batching import collate, length_order, sequence_tokens
from orpo_mlx.logprobs import PairScorer, join_logps, pair_logps
from orpo_mlx.methods import BoundLoss
from orpo_mlx.metrics import MetricMeans, pair_metrics
from orpo_mlx.reference import ReferenceLogProbs, with_reference
from orpo_mlx.types import TokenizedPair


def evaluate(
    scorer: PairScorer,
    pairs: Sequence[TokenizedPair],
    loss: BoundLoss,
    *,
    batch_size: int,
    nll: str,
    reference: ReferenceLogProbs | None,
    untrained: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    suspects: Callable[[list[TokenizedPair]], None] = lambda pairs: None,
) -> dict[str, float]:
    """Mean over all `pairs` of each of `metrics.pair_metrics`, without dropout and without gradient.

    The loss sees the whole split at once, so that no metric depends on `batch_size`. `untrained` says that no
    optimiser step has been taken: the policy's log-probs are then the reference's as well, and are not computed twice.
    `progress` is called with the number of pairs done after each batch, `suspects` at the end with the pairs that have
    a metric that is not finite, if any do.
    """
    model = scorer.model
    was_training = model.training
    model.eval()
    order: list[TokenizedPair] = []
    tokens_per_pair = sequence_tokens(pairs) / len(pairs) if nll == "sequence" else None
    parts = []
    for indices in length_order(pairs, batch_size):
        group = [pairs[index] for index in indices]
        batch = collate(group)
        logps = pair_logps(scorer, batch, nll_tokens_per_pair=tokens_per_pair, gradient=False)
        if reference and untrained:
            reference.adopt(group, logps)
        parts.append(with_reference(logps, reference(group, batch) if reference else None))
        mx.eval(parts[-1])
        order += group
        progress(len(order))
    model.train(was_training)
    together = join_logps(parts)
    means = MetricMeans()
    metrics = pair_metrics(together, loss(together))
    finite = np.all([np.isfinite(np.array(values)) for values in metrics.values()], axis=0)
    if not finite.all():
        suspects([pair for pair, good in zip(order, finite, strict=True) if not good])
    means.add(metrics)
    return means.means()
