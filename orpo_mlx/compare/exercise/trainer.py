"""One training within this process, looked at on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import remove_lora_layers

from orpo_mlx.compare.exercise.contenders import Contender
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.batching import TrainingOrder
from orpo_mlx.engine.pair_scorer import pair_logps
from orpo_mlx.errors import TrainingError
from orpo_mlx.losses.recipe import make_recipe
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.models.loading import LoadedModel
from orpo_mlx.training.prepare import assemble
from orpo_mlx.training.references.reference import with_reference
from orpo_mlx.training.references.reference_store import ReferenceTable
from orpo_mlx.training.run import Run
from orpo_mlx.types import TokenizedPair

Look = Callable[[Run], Mapping[str, Any]]
"""What is measured of a run: `gold` and `kl`, means over prompts, among it."""


class Trained(NamedTuple):
    """A training and what was seen on its way."""

    losses: list[float]
    accuracies: list[float]
    curve: list[dict[str, Any]]
    """What each look found, with its `step`; the first is of step 0."""
    best: int
    """The place in `curve` of the highest gold at a KL of at most the bound."""
    adapters: list[dict[str, mx.array]]
    """Of each look."""
    failed: str | None
    """Why it ended early."""


@contextmanager
def fresh_run(loaded: LoadedModel, config: TrainingConfig, table: ReferenceTable | None = None) -> Iterator[Run]:
    """A run with new adapters on a model without any, which it is without again at the end.

    `table` has log-probs under the model without adapters that the run need not compute, where it has a reference.
    """
    # Before the adapters are made, whose starting values are drawn.
    mx.random.seed(config.seed)
    run = assemble(config, Path(), {}, loaded)
    run.optimizer.init(loaded.model.trainable_parameters())
    if run.reference is not None and table is not None:
        run.reference.table = table
    try:
        yield run
    finally:
        remove_lora_layers(loaded.model)
        loaded.model.freeze()
        loaded.model.eval()


def train(
    run: Run,
    contender: Contender,
    pairs: Sequence[TokenizedPair],
    looks: Sequence[int],
    look: Look,
    bound: float,
    start: Mapping[str, Any],
    least: int = 0,
) -> Trained:
    """Train until the last step of `looks`, looking at each of them, or until a look is beyond the bound.

    The best step, rather than the last, is what a training is worth: how long to train is tuned as well, by the same
    rule for every method. Step 0 is among them, so that a training which leaves the bound at once is worth nothing.
    What would follow beyond the bound is worth nothing either, and is not trained.

    Args:
        run: from `fresh_run`.
        contender: whose steps are taken.
        pairs: to train on.
        looks: steps, rising.
        look: measures the run.
        bound: the largest KL to the base model, in nats per reply.
        start: what a look at the base model finds, which is step 0 of every training.
        least: steps that are trained however large the KL becomes.
    """
    losses: list[float] = []
    accuracies: list[float] = []
    curve: list[dict[str, Any]] = [{"step": 0, **start}]
    best, adapters, failed = 0, [adapter_weights(run.loaded.model)], None
    order = TrainingOrder(pairs, run.config.batch_size, seed=run.config.seed, shuffle=True)
    for step, indices in enumerate(order, 1):
        # Looking leaves the model in evaluation mode.
        run.loaded.model.train()
        try:
            found = contender.step(run, [pairs[index] for index in indices], step)
        except TrainingError as error:
            # A rate that is too high is a result, and no end of the exercise.
            failed = str(error)
            break
        losses.append(found["loss"])
        accuracies.append(found["accuracy"])
        if step in looks:
            curve.append({"step": step, **look(run)})
            adapters.append(adapter_weights(run.loaded.model))
            if curve[-1]["kl"] > bound and step >= least:
                break
            if curve[-1]["kl"] <= bound and curve[-1]["gold"] > curve[best]["gold"]:
                best = len(curve) - 1
        if step >= looks[-1]:
            break
    return Trained(losses, accuracies, curve, best, adapters, failed)


def put_back(run: Run, adapters: Mapping[str, mx.array]) -> None:
    """Set the adapters to what they were at some step."""
    run.loaded.model.update(tree_unflatten(list(adapters.items())))
    mx.eval(run.loaded.model.parameters())


def reward_margins(
    run: Run, reward: str, pairs: Sequence[TokenizedPair], batch_size: int = 64
) -> npt.NDArray[np.float64]:
    """A method's own reward of each pair's chosen side minus that of its rejected side, (N,), as its loss has it.

    With the method's default parameters, which scale a reward and change no order.
    """
    run.loaded.model.eval()
    loss = make_recipe(reward, {}).loss
    margins = []
    for start in range(0, len(pairs), batch_size):
        group = pairs[start : start + batch_size]
        batch = run.scorer.collate(group)
        reference = run.reference(group, batch) if run.reference else None
        output = loss(with_reference(pair_logps(run.scorer, batch, gradient=False), reference))
        margins.append(np.array(output.chosen_rewards - output.rejected_rewards, np.float64))
    return np.concatenate(margins)
