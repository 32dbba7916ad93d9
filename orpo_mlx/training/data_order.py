"""Which pairs each step of a run takes, and where in them a run stands."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.batching import TrainingOrder, held_out_batches, micro_batches, side_lengths, steps_per_epoch
from orpo_mlx.device_profile import RowLayout
from orpo_mlx.errors import ConfigError
from orpo_mlx.models.adapters import adapter_metadata
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.step_values import mismatched_batches, mismatched_in_batches
from orpo_mlx.types import Example

_ORDER_KEY = "orpo_mlx_order"
_STEP_KEY = "orpo_mlx_step"


def pairs_per_step(config: TrainingConfig) -> int:
    """Pairs of an optimiser step."""
    return config.batch_size * config.grad_accumulation_steps


# What a small set needs was measured: docs/methods.md, "How long to train".
_FEW_STEPS, _EPOCHS_OF_FEW = 100, 3


def total_steps(config: TrainingConfig, num_pairs: int) -> int:
    """Optimiser steps of a run: `iters`, or `epochs` passes over the train split.

    Raises:
        ConfigError: more than MLX can count.
    """
    if config.iters is not None:
        return config.iters
    epochs = config.epochs or default_epochs(config, num_pairs)
    steps = epochs * steps_per_epoch(num_pairs, pairs_per_step(config))
    # Infinite is among them, as the product of numbers that are not.
    if steps >= 2**63:
        raise ConfigError(f"`epochs`: found {epochs:g}, expected passes of fewer than 2^63 steps together; give fewer.")
    return max(1, math.ceil(steps))


def default_epochs(config: TrainingConfig, num_pairs: int) -> int:
    """Passes over the train split where no setting says how many: one, or three where one has few steps."""
    return _EPOCHS_OF_FEW if steps_per_epoch(num_pairs, pairs_per_step(config)) < _FEW_STEPS else 1


def training_order(run: Run, done: int = 0) -> TrainingOrder:
    """The step batches of this run after its first `done` steps."""
    config = run.config
    pairs = run.splits["train"].pairs
    step = run.first_step + done
    return TrainingOrder(pairs, pairs_per_step(config), seed=config.seed, shuffle=config.shuffle, step=step)


def epoch_and_step(run: Run, done: int) -> tuple[int, int]:
    """Whole epochs behind a run after `done` steps, and steps into the present one."""
    return divmod(run.first_step + done, steps_per_epoch(len(run.splits["train"].pairs), pairs_per_step(run.config)))


def order_digest(run: Run) -> str:
    """A digest of what the order of step batches depends on: the pairs, their number in a step, the seed."""
    config = run.config
    train = run.splits["train"]
    # Lengths as well as rows: the same rows, tokenised or truncated in another way, fall into other length buckets.
    lengths = hashlib.sha256(side_lengths(train.pairs).tobytes()).hexdigest()
    parts = (train.sha256, lengths, pairs_per_step(config), config.seed, config.shuffle)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def order_metadata(run: Run, done: int) -> dict[str, str]:
    """What an adapter file says of how far in the data its training has come."""
    return {_ORDER_KEY: order_digest(run), _STEP_KEY: str(run.first_step + done)}


def steps_of_adapter_file(run: Run) -> int:
    """Steps that `--resume-adapter-file` has taken in this very order, 0 where it was another."""
    file = run.config.resume_adapter_file
    if file is None or adapter_metadata(file).get(_ORDER_KEY) != order_digest(run):
        return 0
    return steps_taken(file)


def steps_taken(adapters: str | Path) -> int:
    """The steps that an adapter file (or the one in a folder) says it has taken, 0 where it says nothing."""
    step = adapter_metadata(adapters).get(_STEP_KEY, "")
    return int(step) if step.isdecimal() else 0


def evaluation_pairs(run: Run) -> dict[str, Sequence[Example]]:
    """The pairs of each held-out split that are evaluated."""
    limits = {"valid": run.config.val_batches, "test": run.config.test_batches}
    return {
        name: run.splits[name].pairs if limit == -1 else run.splits[name].pairs[: limit * run.config.batch_size]
        for name, limit in limits.items()
        if limit != 0 and name in run.splits
    }


def evaluation_groups(run: Run) -> list[list[Example]]:
    """The pairs of the held-out splits, grouped as the evaluations group them."""
    groups: list[list[Example]] = []
    cut = _cut(run)
    for pairs in evaluation_pairs(run).values():
        own = held_out_batches(pairs, *cut)
        groups += own
        if run.method.wanted.kl:
            groups += mismatched_in_batches(own, run.max_seq_length, *cut)
    return groups


def _cut(run: Run) -> tuple[int, int, RowLayout]:
    """How examples are cut into what is run at a time: the most examples, the most tokens, and their layout."""
    return run.config.batch_size, run.config.micro_batch_tokens, run.scorer.layout


def groups_to_come(run: Run) -> list[list[Example]]:
    """Every pair this run meets, grouped as the first epoch and the evaluations group them; and, where the method asks
    for them, the mismatched prompts and completions of every step, which each epoch makes anew."""
    config = run.config
    pairs = run.splits["train"].pairs
    order = training_order(run)
    per_epoch = steps_per_epoch(len(pairs), pairs_per_step(config))
    # From the middle of an epoch, its rest and one whole epoch meet every pair.
    most = min(total_steps(config, len(pairs)), per_epoch + -order.step % per_epoch)
    groups: list[list[Example]] = []
    cut = _cut(run)
    steps = total_steps(config, len(pairs)) if run.method.wanted.kl else most
    for number, indices in enumerate(itertools.islice(order, steps)):
        step_batch = [pairs[index] for index in indices]
        if number < most:
            groups += micro_batches(step_batch, *cut)
        if run.method.wanted.kl:
            groups += mismatched_batches(step_batch, run.max_seq_length, *cut)
    return groups + evaluation_groups(run)
