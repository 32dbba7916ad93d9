"""`--dry-run`: a run before it is begun: how many steps and tokens, what memory, how long. Nothing is kept."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.batching import completion_counts, side_lengths
from orpo_mlx.memory.choose_mode import plan_memory
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.training.data_order import evaluation_pairs, pairs_per_step, total_steps, training_order
from orpo_mlx.training.distributed import Ranks
from orpo_mlx.training.evaluating.evaluation import evaluate
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.step import optimiser_step
from orpo_mlx.types import Example

# The first step compiles, and reads the weights for the first time.
_WARM_UP = 1
_TIMED = 2


class Course(NamedTuple):
    """What a run comes to."""

    steps: int
    tokens: int
    """Pair tokens of all steps."""
    step_seconds: float
    """Of a step of mean length."""
    evaluation_seconds: float
    """Of all evaluations together."""

    @property
    def seconds(self) -> float:
        """Of steps and evaluations."""
        return self.steps * self.step_seconds + self.evaluation_seconds


def rehearse(config: TrainingConfig, reporter: Reporter, ranks: Ranks) -> Course:
    """Load data and model, take a few steps that nobody keeps, and say what the whole run will come to.

    Raises:
        UserError: what would end the run at its start.
    """
    with tempfile.TemporaryDirectory(prefix="orpo_mlx-") as scratch:
        run = prepare(dataclasses.replace(config, adapter_path=scratch), ranks)
        for name, split in run.splits.items():
            reporter.say(split.summary(name))
        plan_memory(run, reporter.say)
        course = measured(run)
    trainable = sum(array.size for array in adapter_weights(run.loaded.model).values())
    reporter.say(
        f"{course.steps} steps of {pairs_per_step(config)} pairs, {course.tokens:,} pair tokens, {trainable:,} "
        f"parameters trained with {config.method}, `memory={run.memory.mode}`."
    )
    reporter.say(
        f"A step takes {course.step_seconds:.2f} s here ({_TIMED} were timed); the run {spoken(course.seconds)}, of "
        f"which evaluations {spoken(course.evaluation_seconds)}. Nothing was kept: {config.adapter_path}/ is as it was."
    )
    return course


def measured(run: Run) -> Course:
    """Take a few steps and evaluate a few pairs, and reckon from their tokens to all."""
    config = run.config
    train = run.splits["train"].pairs
    steps = total_steps(config, len(train))
    tokens_per_step = pair_tokens(train) / len(train) * pairs_per_step(config)
    batches = iter(training_order(run))
    run.loaded.model.train()
    seconds = tokens = 0.0
    # One step is timed even of a run that has a single one.
    for number in range(min(_WARM_UP + _TIMED, max(steps, _WARM_UP + 1))):
        batch = [train[index] for index in next(batches)]
        began = time.perf_counter()
        optimiser_step(run, batch, number + 1)
        if number >= _WARM_UP:
            seconds += time.perf_counter() - began
            tokens += sum(example.pair_tokens for example in batch)
    return Course(
        steps, round(steps * tokens_per_step), seconds / tokens * tokens_per_step, evaluation_seconds(run, steps)
    )


def evaluation_seconds(run: Run, steps: int) -> float:
    """How long all evaluations will take, from that of two batches."""
    config = run.config
    held_out = evaluation_pairs(run)
    if not held_out:
        return 0.0
    few = list(next(iter(held_out.values()))[: 2 * config.batch_size])
    began = time.perf_counter()
    evaluate(
        run.scorer,
        few,
        run.method,
        batch_size=config.batch_size,
        nll=config.nll,
        reference=run.reference,
        micro_batch_tokens=config.micro_batch_tokens,
        max_seq_length=run.max_seq_length,
    )
    per_token = (time.perf_counter() - began) / sum(example.pair_tokens for example in few)
    # Before, after and along the way for the valid split; before and after for the test split.
    times = {"valid": 2 + (steps - 1) // config.steps_per_eval, "test": 2}
    return per_token * sum(times[name] * pair_tokens(pairs) for name, pairs in held_out.items())


def pair_tokens(examples: Sequence[Example]) -> int:
    """The pair tokens of many examples, without reading one."""
    lengths, counts = side_lengths(examples), completion_counts(examples)
    return int((lengths[:, 0] * counts + lengths[:, 1] + lengths[:, 2]).sum())


def spoken(seconds: float) -> str:
    """A time as one says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
