"""What losses of single completions measure rewards from: an estimate of KL(π ‖ π_ref), and a running mean."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from orpo_mlx.data.batching import held_out_batches, micro_batches
from orpo_mlx.data.tokens.trained_turns import learned_ids
from orpo_mlx.device_profile import RowLayout
from orpo_mlx.engine.pair_scorer import PairScorer, group_logps
from orpo_mlx.losses.metrics import MetricMeans
from orpo_mlx.training.distributed import Ranks
from orpo_mlx.training.references.reference import ReferenceLogProbs, with_reference
from orpo_mlx.types import Example, GroupLogProbs, LogProbs, TokenizedGroup


class StepValues(NamedTuple):
    """Of a whole step, float32; None where the method does not ask."""

    kl: mx.array | None = None
    """See `GroupLogProbs`; so is the next."""
    running: mx.array | None = None

    def metrics(self) -> dict[str, float]:
        """What of it is logged: the KL estimate as TRL logs it, at least 0."""
        return {} if self.kl is None else {"kl": max(0.0, float(self.kl))}


@dataclasses.dataclass
class RunningMean:
    """The mean of all rewards that steps have had, each completion counting the same."""

    mean: float = 0.0
    count: float = 0.0

    def update(self, means: MetricMeans) -> None:
        """Take in a step's rewards."""
        total, count = means.total("rewards/chosen", "rewards/rejected")
        if count:
            self.mean += (total / count - self.mean) * (count / (self.count + count))
            self.count += count

    def array(self, *, frozen: bool = False) -> mx.array:
        """(2,): as `GroupLogProbs.running`; `frozen`: as it is where nothing is learned, moved by no reward."""
        return mx.array([self.mean, math.inf if frozen else self.count], mx.float32)


def with_step_values(logps: LogProbs, values: StepValues) -> LogProbs:
    """`logps` with the step's values beside them."""
    return logps._replace(kl=values.kl, running=values.running) if isinstance(logps, GroupLogProbs) else logps


def mismatched(examples: Sequence[Example], max_seq_length: int) -> list[Example]:
    """Each prompt with the completions of the nearest example before it that has another prompt; before the first
    stands the last.

    As in TRL: over a batch of different prompts, the mismatched completions are the same ones as the matched, cut where
    prompt and completion are longer than `max_seq_length`. A prompt without another has none to be mismatched with, and
    its own completions would say nothing of the divergence: none (in TRL its own).
    """
    # In a circle from where a prompt follows another one: from there on "the nearest before" is known at each place.
    starts = (n for n, each in enumerate(examples) if each.prompt_ids != examples[n - 1].prompt_ids)
    start = next(starts, len(examples))
    circle = [*examples[start:], *examples[:start]] if start < len(examples) else []
    found: list[Example] = []
    for number, own in enumerate(circle):
        if circle[number - 1].prompt_ids != own.prompt_ids:
            other = circle[number - 1]
        cut = [ids[: max(0, max_seq_length - len(own.prompt_ids))] for ids in other.completions]
        kept = [(ids, score) for ids, score in zip(cut, other.scores, strict=True) if learned_ids(ids)]
        if kept:
            completions, scores = zip(*kept, strict=True)
            found.append(TokenizedGroup(own.prompt_ids, completions, scores, other.labelled, (), own.location))
    return found


def mismatched_batches(
    examples: Sequence[Example],
    max_seq_length: int,
    batch_size: int,
    most_tokens: int,
    layout: RowLayout | None = None,
) -> list[list[Example]]:
    """`mismatched`, in the batches they are run in."""
    return micro_batches(mismatched(examples, max_seq_length), batch_size, most_tokens, layout)


def mismatched_in_batches(
    batches: Sequence[Sequence[Example]],
    max_seq_length: int,
    batch_size: int,
    most_tokens: int | None,
    layout: RowLayout | None = None,
) -> list[list[Example]]:
    """`mismatched` of all examples of a held-out split, in the order of their batches, in batches of like length.

    Over the split and not over each batch, so that no metric depends on how the split is cut.
    """
    examples = mismatched(list(itertools.chain(*batches)), max_seq_length)
    return held_out_batches(examples, batch_size, most_tokens, layout)


def kl_estimate(
    scorer: PairScorer,
    reference: ReferenceLogProbs,
    batches: Sequence[Sequence[Example]],
    ranks: Ranks,
) -> mx.array:
    """(1,): the mean of log π(y'|x) - log π_ref(y'|x) over all completions y' of some mismatched examples.

    Ethayarajh et al. 2024, section 4.1; without gradient. Each of `ranks` runs its share.
    """
    if ranks.size > 1:
        reference.remember_among(ranks, batches)
    # An empty one first: a rank may have no batch at all, and nothing cannot be joined.
    differences = np.concatenate([np.zeros(0), *_differences(scorer, reference, ranks.share(batches))])
    parts = ranks.gather([float(differences.sum()), len(differences)])
    return mx.array([sum(total for total, _ in parts) / max(1, sum(count for _, count in parts))], mx.float32)


def _differences(
    scorer: PairScorer, reference: ReferenceLogProbs, batches: Sequence[Sequence[Example]]
) -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    for examples in batches:
        batch = scorer.collate(examples, whole_groups=True)
        logps = with_reference(group_logps(scorer, batch, gradient=False), reference.values(examples, batch))
        assert isinstance(logps, GroupLogProbs)
        # In float64 on the host: the mean of thousands of completions keeps its digits.
        yield (np.array(logps.logps, np.float64) - np.array(logps.reference, np.float64)).reshape(-1)
