"""Log-probs under the reference model, remembered per pair. Never a second copy of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, overload

import mlx.core as mx
import numpy as np

from orpo_mlx.engine.pair_scorer import PairScorer, log_probs
from orpo_mlx.models.adapters import adapters_off
from orpo_mlx.package_versions import version_of
from orpo_mlx.training.distributed import Ranks
from orpo_mlx.training.references.reference_store import ReferenceTable, identity_digest, weights_fingerprint
from orpo_mlx.types import SUMS_ALONE, Batch, Example, GroupLogProbs, LogProbs, PairLogProbs, Wanted

_MATHS = 1
"""Raised when this package computes other log-probs from the same weights and tokens, beyond rounding."""


class ReferenceValues(NamedTuple):
    """Log-probs under the reference of P pairs, nats, float32, (P,) each; see `PairLogProbs`."""

    chosen: mx.array
    rejected: mx.array
    chosen_tail: mx.array | None = None
    """Where the method looks at tails; so is the next."""
    rejected_tail: mx.array | None = None


class GroupReference(NamedTuple):
    """Log-probs under the reference of every completion of B groups, nats, float32."""

    logps: mx.array
    """(B, K)."""


TAILS = b"tails"
"""A row of the table for both tails of a pair stands under another key than that of its whole completions."""


def keys_of(example: Example) -> tuple[bytes, ...]:
    """Digests of an example's token ids: of the prompt with its first and second completion, with the third and fourth,
    and so on. A pair has one, a group one for every two completions."""
    completions = [*example.completions, *([()] if len(example.completions) % 2 else [])]
    return tuple(_digest(example.prompt_ids, *two) for two in zip(completions[::2], completions[1::2], strict=True))


def tail_keys_of(example: Example) -> tuple[bytes, ...]:
    """The same of an example's pairs: where a tail begins depends on both sides."""
    own = example.completions
    return tuple(_digest(example.prompt_ids, own[better], own[worse], what=TAILS) for better, worse in example.pairs)


def _digest(*sides: Sequence[int], what: bytes = b"") -> bytes:
    digest = hashlib.blake2b(what, digest_size=16)
    for ids in sides:
        # Lengths too: the same tokens, divided in another way into prompt and completions, are another pair.
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.array(ids, np.int32).tobytes())
    return digest.digest()


class ReferenceLogProbs:
    """Summed log-probs of both completions under the model as it was before training.

    With `adapters_are_new` (fresh LoRA or DoRA), the reference is the model with its adapters off, computed when a
    pair is first met. Otherwise (full fine-tuning, or training on from an adapter) the weights that define it are
    about to change, so `remember` must be called for every pair before the first step.

    Args:
        scorer: the policy.
        is_start: whether it is the model as it was before training: an untrained policy's log-probs are then its own.
        adapters_are_new: whether "adapters off" is the model as it was before training.
        with_prompt: whether the policy's prompt tokens go through the head as well (`nll="sequence"`). The reference's
            then do too, so that policy and reference are the same sums, bit for bit, where they are the same model:
            dpop's gradient jumps there.
        wanted: what the method looks at besides sums of completions.
    """

    def __init__(
        self,
        scorer: PairScorer,
        *,
        adapters_are_new: bool,
        is_start: bool = True,
        with_prompt: bool = False,
        wanted: Wanted = SUMS_ALONE,
    ) -> None:
        self.scorer = scorer
        self.is_start = is_start
        # Alignment is the policy's alone.
        self._wanted = wanted._replace(alignment=False)
        self._live = adapters_are_new
        # Any number will do: it asks for the prompts, and nobody looks at the reference's own NLL.
        self._nll_tokens_per_pair = 1.0 if with_prompt else None
        self.table = ReferenceTable()

    def keep_in(self, folder: Path, model_config: Mapping[str, Any]) -> None:
        """Remember in a file of `folder` as well, and begin with what it holds of this very reference.

        Call it before the first step. The file is named by all that the numbers depend on besides a pair's tokens:
        content of the weights, the model's config, what is run how, versions. Batches are not part of it: in another
        composition the numbers differ by rounding.
        """
        with self._reference_weights():
            weights = weights_fingerprint(self.runner.model)
        identity = {
            "weights": weights,
            "model_config": model_config,
            "prompt_through_head": self._nll_tokens_per_pair is not None,
            "shares_prompt": self.runner.shares_prompt,
            "splits_head": self.runner.splits_head,
            "device": str(mx.default_device()),
            "versions": {"maths": _MATHS, **{name: version_of(name) for name in ("orpo-mlx", "mlx", "mlx-lm")}},
        }
        self.table = ReferenceTable(folder / f"{identity_digest(identity)}.npz", identity)

    @property
    def runner(self) -> PairScorer:
        """What computes the log-probs."""
        return self.scorer

    def after_step(self, step: int) -> None:
        """Called after each optimiser step, before anything is reported, saved or evaluated."""

    @property
    def needs_precomputing(self) -> bool:
        """Whether every pair must be remembered before the first step."""
        return not self._live

    def values(self, examples: Sequence[Example], batch: Batch) -> ReferenceValues | GroupReference:
        """Reference log-probs of the groups of `batch` where it is one of whole groups, and of its pairs elsewhere.

        Raises:
            KeyError: see `__call__`.
        """
        return self(examples, batch) if batch.groups is None else self.of_groups(examples, batch)

    def of_groups(self, groups: Sequence[Example], batch: Batch) -> GroupReference:
        """Reference log-probs of every completion; KeyError as below."""
        self._require(groups, batch)
        return GroupReference(mx.array([self._known(group) for group in groups], mx.float32))

    def __call__(self, pairs: Sequence[Example], batch: Batch) -> ReferenceValues:
        """Reference log-probs of the chosen and rejected sides of `batch`.

        Raises:
            KeyError: a pair that was not remembered, where the reference can no longer be computed.
        """
        self._require(pairs, batch)
        of_pairs = [
            (values[better], values[worse])
            for pair, values in zip(pairs, map(self._known, pairs), strict=True)
            for better, worse in pair.pairs
        ]
        columns = [of_pairs]
        if self._wanted.tails:
            columns.append([self.table.get(key) for pair in pairs for key in tail_keys_of(pair)])  # type: ignore[misc]
        return ReferenceValues(*(mx.array(side) for two in columns for side in np.array(two, np.float32).T))

    def _require(self, pairs: Sequence[Example], batch: Batch) -> None:
        """Know everything about these, computing what is missing; KeyError where that is too late."""
        missing = [place for place, pair in enumerate(pairs) if not self.knows(pair)]
        if missing and not self._live:
            raise KeyError("a pair has no reference log-probs and the weights that define them have changed.")
        if missing:
            some = [pairs[place] for place in missing]
            self._compute(some, batch if len(some) == len(pairs) else self._collate(some))

    def knows(self, pair: Example) -> bool:
        """Whether everything about a pair is remembered."""
        return all(self.table.get(key) is not None for key in self._keys(pair))

    def adopt(self, pairs: Sequence[Example], logps: LogProbs) -> None:
        """Keep log-probs as the reference's: those of an untrained policy, where `is_start`, or of another rank."""
        self._keep(pairs, logps)

    def forget_if_moved(self) -> None:
        """Called before and after an evaluation of the model before training that comes after the steps: what is known
        of the one is not true of the other, where the reference has moved between them."""

    def remember(
        self, groups: Iterable[Sequence[Example]], progress: Callable[[int], None] = lambda done: None
    ) -> None:
        """Compute and keep the reference log-probs of all pairs, group by group, with the weights as they are now.

        Groups in the composition training will use give the very same floating-point sums as training's first step; but
        for layers that mlx-lm runs by a kernel of Metal where no gradient is taken, which differ by rounding.
        Pairs that are known are passed over. `progress` is called with the number of pairs done.
        """
        was_training = self.scorer.model.training
        self.scorer.model.eval()
        done = 0
        for group in groups:
            missing = [pair for pair in group if not self.knows(pair)]
            if missing:
                self._compute(missing, self._collate(missing))
            done += len(group)
            progress(done)
        self.scorer.model.train(was_training)

    def remember_among(
        self,
        ranks: Ranks,
        groups: Sequence[Sequence[Example]],
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """`remember`, each of `ranks` computing its share of the groups; all of them then know all pairs."""
        # Before any is computed, and on every rank: each must know which pairs the rows are of that the others send.
        unknown = [
            [pair for group in ranks.share(groups, rank) for pair in group if not self.knows(pair)]
            for rank in range(ranks.size)
        ]
        self.remember(ranks.share(groups), progress)
        if ranks.size > 1 and any(unknown):
            keys = [[key for pair in pairs for key in self._keys(pair)] for pairs in unknown]
            found = ranks.gather([self.table.get(key) for key in keys[ranks.rank]])
            for keys_of_rank, rows in zip(keys, found, strict=True):
                for key, (chosen, rejected) in zip(keys_of_rank, rows, strict=True):
                    self.table.add(key, chosen, rejected)

    def unknown(self, groups: Iterable[Sequence[Example]]) -> int:
        """How many pairs of `groups` are not remembered."""
        return sum(not self.knows(pair) for group in groups for pair in group)

    def _keys(self, example: Example) -> list[bytes]:
        return [*keys_of(example), *(tail_keys_of(example) if self._wanted.tails else ())]

    def _collate(self, pairs: Sequence[Example]) -> Batch:
        with_prompt = self._nll_tokens_per_pair is not None
        return self.runner.collate(pairs, with_prompt=with_prompt, whole_groups=self._wanted.groups)

    def _compute(self, pairs: Sequence[Example], batch: Batch) -> None:
        with self._reference_weights():
            tokens = self._nll_tokens_per_pair
            logps = log_probs(self.runner, batch, nll_tokens_per_pair=tokens, gradient=False, wanted=self._wanted)
            self._keep(pairs, logps)

    def _reference_weights(self) -> AbstractContextManager[None]:
        """The context in which `runner` is the reference."""
        return adapters_off(self.scorer.model) if self._live else nullcontext()

    def _keep(self, pairs: Sequence[Example], logps: LogProbs) -> None:
        if isinstance(logps, GroupLogProbs):
            for group, row in zip(pairs, np.array(logps.logps).tolist(), strict=True):
                self._add(group, row)
            return
        sides = zip(np.array(logps.chosen).tolist(), np.array(logps.rejected).tolist(), strict=True)
        for example in pairs:
            values = [0.0] * len(example.completions)
            # Every completion of a group is in some pair of it. `zip` asks for a pair first, and takes no side in vain.
            for (better, worse), (chosen, rejected) in zip(example.pairs, sides, strict=False):
                values[better] = chosen
                values[worse] = rejected
            self._add(example, values)
        if self._wanted.tails:
            tails = zip(np.array(logps.chosen_tail).tolist(), np.array(logps.rejected_tail).tolist(), strict=True)
            for key, row in zip((key for example in pairs for key in tail_keys_of(example)), tails, strict=True):
                self.table.add(key, *row)

    def _add(self, example: Example, values: Sequence[float]) -> None:
        # A row of the table has two values: the last of an odd number of completions shares its row with a 0.
        padded = [*values, 0.0]
        for number, key in enumerate(keys_of(example)):
            self.table.add(key, padded[2 * number], padded[2 * number + 1])

    def _known(self, example: Example) -> list[float]:
        """The log-prob of each completion of an example that is known."""
        found = [self.table.get(key) for key in keys_of(example)]
        return [value for two in found if two is not None for value in two][: len(example.completions)]


@overload
def with_reference(logps: PairLogProbs, reference: ReferenceValues | None) -> PairLogProbs: ...
@overload
def with_reference(logps: LogProbs, reference: ReferenceValues | GroupReference | None) -> LogProbs: ...
def with_reference(logps: LogProbs, reference: ReferenceValues | GroupReference | None) -> LogProbs:
    """`logps` with the reference's log-probs beside them."""
    if reference is None:
        return logps
    if isinstance(reference, GroupReference):
        assert isinstance(logps, GroupLogProbs)
        return logps._replace(reference=reference.logps)
    return logps._replace(**{f"reference_{name}": value for name, value in reference._asdict().items()})


def as_policy(logps: LogProbs) -> LogProbs:
    """The reference's log-probs in the place of the policy's."""
    if isinstance(logps, GroupLogProbs):
        assert logps.reference is not None
        return logps._replace(logps=logps.reference)
    theirs = {name: getattr(logps, f"reference_{name}") for name in ReferenceValues._fields}
    return logps._replace(**theirs)
