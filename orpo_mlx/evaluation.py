"""Held-out metrics of a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orpo_mlx.batching import collate, length_order, sequence_tokens
from orpo_mlx.logprobs import PairScorer, pair_logps
from orpo_mlx.metrics import MetricMeans, pair_metrics
from orpo_mlx.reference import ReferenceLogProbs, with_reference
from orpo_mlx.types import LossOutput, PairLogProbs, TokenizedPair


def evaluate(
    scorer: PairScorer,
    pairs: Sequence[TokenizedPair],
    loss: Callable[[PairLogProbs], LossOutput],
    *,
    batch_size: int,
    nll: str,
    reference: ReferenceLogProbs | None,
    untrained: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Mean over all `pairs` of each of `metrics.pair_metrics`, without dropout and without gradient.

    `untrained` says that no optimiser step has been taken: the policy's log-probs are then the reference's as well, and
    are not computed twice. `progress` is called with the number of pairs done after each batch.
    """
    model = scorer.model
    was_training = model.training
    model.eval()
    tokens_per_pair = sequence_tokens(pairs) / len(pairs) if nll == "sequence" else None
    means = MetricMeans()
    for indices in length_order(pairs, batch_size):
        group = [pairs[index] for index in indices]
        batch = collate(group)
        logps = pair_logps(scorer, batch, nll_tokens_per_pair=tokens_per_pair, gradient=False)
        if reference and untrained:
            reference.adopt(group, logps)
        logps = with_reference(logps, reference(group, batch) if reference else None)
        means.add(pair_metrics(logps, loss(logps)))
        progress(means.pairs)
    model.train(was_training)
    return means.means()
