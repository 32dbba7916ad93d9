"""Held-out metrics of a split."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from orpo_mlx.data.batching import count_pairs, held_out_batches, row_weights, sequence_tokens, two_sided
from orpo_mlx.engine.pair_scorer import PairScorer, join_logps, log_probs
from orpo_mlx.losses.metrics import MetricMeans, metric_array
from orpo_mlx.losses.recipe import Recipe
from orpo_mlx.process_memory import clear_cache_above
from orpo_mlx.reporting.console import Reporter, eval_line
from orpo_mlx.reporting.metrics_log import MetricsFile
from orpo_mlx.training.checkpoints.progress import EvalMetrics
from orpo_mlx.training.data_order import evaluation_pairs
from orpo_mlx.training.distributed import Ranks
from orpo_mlx.training.interrupts import StopSignals
from orpo_mlx.training.references.reference import ReferenceLogProbs, as_policy, with_reference
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.row_values import row_values, with_row_values
from orpo_mlx.training.steps.step_values import (
    RunningMean,
    StepValues,
    kl_estimate,
    mismatched_in_batches,
    with_step_values,
)
from orpo_mlx.types import Example

Validated = Callable[[int, Mapping[str, float], float], object]
"""Told of the step, the metrics and the seconds of a validation."""


class Evaluated(NamedTuple):
    """What an evaluation finds."""

    metrics: dict[str, float]
    not_finite: list[Example]
    """The pairs that have a metric which is not finite."""


def evaluate(
    scorer: PairScorer,
    pairs: Sequence[Example],
    method: Recipe,
    *,
    batch_size: int,
    nll: str,
    reference: ReferenceLogProbs | None,
    max_seq_length: int,
    micro_batch_tokens: int | None = None,
    untrained: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    ranks: Ranks | None = None,
    rewards: RunningMean | None = None,
) -> Evaluated:
    """Mean over all `pairs` of each metric (`metrics.metric_array`), without dropout and without gradient.

    The loss sees the whole split at once, so that no metric depends on `batch_size`, nor on `micro_batch_tokens`, the
    most that are run at a time where that is fewer (None: no limit). `untrained` says that no
    optimiser step has been taken: the policy's log-probs are then the reference's as well, and are not computed twice.
    Each of `ranks` runs its share of the batches, and all of them return the metrics of all pairs.
    `progress` is called with the number of pairs done after each batch. `rewards` are those of the steps so far, for
    methods that ask for them; `max_seq_length` is that of mismatched rows, for those.
    """
    model = scorer.model
    was_training = model.training
    model.eval()
    tokens_per_pair = sequence_tokens(pairs) / count_pairs(pairs) if nll == "sequence" else None
    weighted = bool((row_weights(pairs) != 1).any())
    parts, done = [], 0
    ranks = ranks or Ranks()
    groups = held_out_batches(pairs, batch_size, micro_batch_tokens, scorer.layout)
    for group in ranks.share(groups):
        batch = scorer.collate(group, with_prompt=tokens_per_pair is not None, whole_groups=method.wanted.groups)
        logps = log_probs(scorer, batch, nll_tokens_per_pair=tokens_per_pair, gradient=False, wanted=method.wanted)
        if reference and untrained and reference.is_start:
            reference.adopt(group, logps)
        logps = with_reference(logps, reference.values(group, batch) if reference else None)
        parts.append(with_row_values(logps, row_values(group, method, weighted=weighted)))
        # Batch by batch: all graphs evaluated together at the end could hold the activations of several.
        mx.eval(parts[-1])
        done += len(group)
        progress(done)
    order = [pair for rank in range(ranks.size) for group in ranks.share(groups, rank) for pair in group]
    together = join_logps(parts) if ranks.size == 1 else ranks.gather_logps(parts)
    if reference:
        # Every rank knows what the others have computed.
        reference.adopt(order, as_policy(together))
    # A policy that is its reference has no divergence from it to estimate.
    others: list[list[Example]] = []
    if method.wanted.kl and not (untrained and reference and reference.is_start):
        others = mismatched_in_batches(groups, max_seq_length, batch_size, micro_batch_tokens, scorer.layout)
    values = values_of_split(scorer, reference, method, others, rewards, ranks)
    # Only now: the divergence is taken without dropout as well, and draws no random numbers.
    model.train(was_training)
    together = with_step_values(together, values)
    metrics = np.array(metric_array(together, method.loss(together)))
    of_each = order if method.wanted.groups else [example for example in order for _ in example.pairs]
    means = MetricMeans()
    means.add_array(metrics, None if method.wanted.groups else two_sided(order))
    return Evaluated({**means.means(), **values.metrics()}, not_finite(metrics, of_each))


def not_finite(metrics: np.ndarray[Any, Any], examples: Sequence[Example]) -> list[Example]:
    """The examples that have a metric which is not finite, each once; `metrics` has one of them in each column."""
    finite = np.isfinite(metrics).all(axis=tuple(range(metrics.ndim - 1)))
    return list(dict.fromkeys(example for example, good in zip(examples, finite, strict=True) if not good))


def values_of_split(
    scorer: PairScorer,
    reference: ReferenceLogProbs | None,
    method: Recipe,
    others: Sequence[Sequence[Example]],
    rewards: RunningMean | None,
    ranks: Ranks,
) -> StepValues:
    """What a method measures the rewards of a split from; `others` are mismatched examples, in batches."""
    # Frozen, so that the split's own rewards do not move the mean they are measured from.
    values = StepValues(None, (rewards or RunningMean()).array(frozen=True) if method.wanted.running else None)
    if not method.wanted.kl:
        return values
    assert reference is not None
    return values._replace(kl=kl_estimate(scorer, reference, others, ranks))


def evaluate_splits(
    run: Run,
    names: Sequence[str],
    *,
    step: int,
    untrained: bool,
    reporter: Reporter,
    metrics_file: MetricsFile,
    stop: StopSignals,
    told: Validated = lambda step, metrics, seconds: None,
) -> EvalMetrics:
    """Evaluate the held-out splits among `names`.

    Args:
        run: with the weights to judge.
        names: splits; those that the run has not are passed over.
        step: the step these weights are of.
        untrained: whether the policy is still the reference.
        reporter: where it is said.
        metrics_file: where it is written down.
        stop: how it is asked to end.
        told: called after the valid split.
    """
    held: EvalMetrics = {}
    for name, pairs in evaluation_pairs(run).items():
        if name not in names:
            continue
        started = time.perf_counter()
        with reporter.bar(f"evaluating {name}", len(pairs), "pairs") as advance:

            def progress(done: int, advance: Callable[[int], None] = advance) -> None:
                advance(done)
                clear_cache_above(run.config.clear_cache_threshold)
                # Of several ranks none may leave alone: the others would wait for it.
                if run.ranks.size == 1:
                    stop.check()

            # An untrained policy has had no rewards, also where the steps behind it are measured from theirs.
            found = evaluate(
                run.scorer,
                pairs,
                run.method,
                batch_size=run.config.batch_size,
                nll=run.config.nll,
                reference=run.reference,
                max_seq_length=run.max_seq_length,
                micro_batch_tokens=run.config.micro_batch_tokens,
                untrained=untrained,
                progress=progress,
                ranks=run.ranks,
                rewards=None if untrained else run.rewards,
            )
        held[name] = found.metrics
        metrics_file.write(step, name, held[name])
        reporter.figures(eval_line(step, name, held[name]))
        if found.not_finite:
            places = ", ".join(pair.location for pair in found.not_finite[:4])
            reporter.say(f"Warning: not finite at step {step} on {len(found.not_finite)} {name} pairs: {places}.")
        if name == "valid":
            told(step, held[name], max(time.perf_counter() - started, 0.0))
    return held
