"""The functions that an optimiser step calls, compiled where the device wants that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from orpo_mlx.engine.compiled import CompiledByShape
from orpo_mlx.engine.memory_modes import Memory
from orpo_mlx.engine.pair_scorer import PairScorer, log_probs
from orpo_mlx.engine.segmented_backward import Gradients, Share
from orpo_mlx.losses.metrics import metric_array, with_balance_loss
from orpo_mlx.losses.recipe import Recipe
from orpo_mlx.training.references.reference import GroupReference, ReferenceValues, with_reference
from orpo_mlx.training.steps.row_values import RowValues, with_row_values
from orpo_mlx.training.steps.step_values import StepValues, with_step_values
from orpo_mlx.types import Batch, LogProbs

TRACED_AT = 16
"""How often a shape is met before a micro-batch's whole graph is compiled for it.

Measured on a CPU for 30 layers, in seconds of the host: 0.055 to build the graph plainly, 0.42 to trace it, 0.03 to
replay the trace. So a trace costs what 0.39 / 0.025 = 16 replays save, and traced at that meeting a shape never costs
more than 1.4 times what it would if it were known how often it comes. Reckoned for Macs, where what fused kernels save
on the device is not known.
"""


@contextmanager
def traced_at_once() -> Iterator[None]:
    """What is made within the block compiles every shape when it is first met: for looking at compiled steps."""
    with patch(f"{__name__}.TRACED_AT", 1):
        yield


class LossGradient(NamedTuple):
    """d(step loss)/d(log-probs) of one micro-batch, for losses that couple pairs."""

    chosen: mx.array | None = None
    rejected: mx.array | None = None
    nll: mx.array | None = None
    chosen_tail: mx.array | None = None
    """Where the loss looks at tails; so is the next."""
    rejected_tail: mx.array | None = None
    logps: mx.array | None = None
    """Of whole groups."""

    def times(self, logps: LogProbs) -> mx.array:
        """A scalar whose gradient is the step loss's, by the chain rule through the log-probs."""
        values = differentiated(logps)
        products = [each * values[name] for name, each in self._asdict().items() if each is not None]
        return mx.stack(products).sum(axis=0).sum()


def differentiated(logps: LogProbs) -> dict[str, mx.array]:
    """What of `logps` a loss has a gradient towards, by `LossGradient`'s names."""
    values = {name: getattr(logps, name, None) for name in LossGradient._fields}
    return {name: value for name, value in values.items() if value is not None}


class BalanceShare(NamedTuple):
    """A micro-batch's share of `Routers.loss`."""

    factor: mx.array
    """`router_aux_loss_coef` times the micro-batch's share of the step's rows, float32."""
    lengths: tuple[mx.array, ...]
    """Tokens of each row, for each array of rows."""


class MicroBatch(NamedTuple):
    """All that a micro-batch's gradient depends on beside the model: a tree of arrays, which `mx.compile` takes."""

    batch: Batch
    reference: ReferenceValues | GroupReference | None
    """Where the method needs them."""
    rows: RowValues
    step_pairs: mx.array
    """Pairs of the step batch, or completions or lists, float32: losses are divided by it."""
    nll_tokens_per_pair: mx.array | None
    """See `pair_logps`."""
    loss_gradient: LossGradient | None
    """Given where the loss couples pairs and the step batch is in several parts."""
    values: StepValues = StepValues()
    balance: BalanceShare | None = None
    """Given where routers of experts are kept balanced."""


class StepFunctions:
    """A step's gradient of one micro-batch, its norm and its update.

    Args:
        scorer: the policy.
        memory: how its gradient is taken.
        method: its loss, and what that looks at.
        optimizer: updates the policy's trained parameters.
    """

    def __init__(self, scorer: PairScorer, memory: Memory, method: Recipe, optimizer: optim.Optimizer) -> None:
        self._model, self._optimizer = scorer.model, optimizer
        most = scorer.profile.most_traces
        # None of these refers to this object: a circle would keep a model's memory until Python looks for circles.
        share = partial(_share, scorer, method)
        self.micro_batch = partial(_micro_batch, memory, share)
        """A `MicroBatch` to its share of the step loss, its metrics (metrics, B), and the share's gradients by name."""
        self.add_micro_batch = CompiledByShape(
            partial(_add_micro_batch, self.micro_batch),
            lambda: [scorer.model.state, mx.random.state],
            # Segments are evaluated as they go: they are compiled one by one, not as part of this.
            most if memory.in_one_graph else 0,
            TRACED_AT,
        )
        """The same, its gradients added to those of the micro-batches before."""
        # Of these all steps have the same shapes.
        self.norm = CompiledByShape(gradient_norm, list, most)
        self._apply = CompiledByShape(
            partial(_apply, scorer.model, optimizer), lambda: [scorer.model.state, optimizer.state], most
        )

    def update(self, gradients: Gradients, factor: float = 1.0) -> None:
        """Let the optimiser apply `factor` times the gradients."""
        if self._apply.compiles:
            # A state that came to be inside of a trace would not be seen by the next call.
            self._optimizer.init(self._model.trainable_parameters())
        # An array: a compiled function would keep a Python number as a constant of its trace.
        self._apply(gradients, None if factor == 1 else mx.array(factor))


def _micro_batch(memory: Memory, share: Share, inputs: MicroBatch) -> tuple[mx.array, mx.array, Gradients]:
    (loss, metrics), gradients = memory.value_and_grad(inputs.batch, inputs, share)
    return loss, metrics, gradients


def _share(
    scorer: PairScorer, method: Recipe, states: mx.array, batch: Batch, inputs: MicroBatch
) -> tuple[mx.array, mx.array]:
    """A micro-batch's share of the step loss, and its metrics, from the states its targets are predicted from."""
    tokens = inputs.nll_tokens_per_pair
    policy = log_probs(scorer, batch, nll_tokens_per_pair=tokens, states=states, wanted=method.wanted)
    logps = with_row_values(with_reference(policy, inputs.reference), inputs.rows)
    logps = with_step_values(logps, inputs.values)
    output = method.loss(logps)
    given = inputs.loss_gradient
    total = output.losses.sum() / inputs.step_pairs if given is None else given.times(logps)
    # One array: MLX 0.32.4 cannot compile several outputs that are one number behind `stop_gradient` ("map::at").
    metrics = metric_array(logps, output)
    if inputs.balance is not None and scorer.routers is not None:
        balance = scorer.routers.loss(inputs.balance.lengths, [ids.shape[1] for ids in batch.row_ids])
        total = total + inputs.balance.factor * balance
        metrics = with_balance_loss(metrics, balance)
    return total, metrics


def _add_micro_batch(
    micro_batch: Callable[[MicroBatch], tuple[mx.array, mx.array, Gradients]], inputs: MicroBatch, before: Gradients
) -> tuple[mx.array, mx.array, Gradients]:
    loss, metrics, gradients = micro_batch(inputs)
    for name in list(before):
        # One at a time: two whole gradients need not exist at once.
        gradients[name] = before.pop(name) + gradients[name]
    return loss, metrics, gradients


def _apply(
    model: nn.Module, optimizer: optim.Optimizer, gradients: Gradients, factor: mx.array | None
) -> list[mx.array]:
    if factor is not None:
        # Half precision times a float32 array is float32, and the weights would be that after the update.
        gradients = {name: gradient * factor.astype(gradient.dtype) for name, gradient in gradients.items()}
    optimizer.update(model, tree_unflatten(list(gradients.items())))
    # A compiled function has to return arrays; what this one changes is in its state.
    return []


def gradient_norm(gradients: Gradients) -> mx.array:
    """Euclidean norm over all trained parameters, in float32; not finite where any entry is not."""
    # float16 ends at 65,504: squares leave it where the gradient itself is far within it.
    squares = [value.astype(mx.float32).square().sum() for value in gradients.values()]
    return mx.sqrt(mx.stack(squares).sum())
