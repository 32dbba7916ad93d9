"""References with weights of their own: another model, a copy of the policy, and one that follows the policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from orpo_mlx.engine.pair_scorer import PairScorer, group_logps, pair_logps
from orpo_mlx.models.adapters import adapter_weights, adapters_off
from orpo_mlx.training.references.reference import GroupReference, ReferenceLogProbs, ReferenceValues
from orpo_mlx.training.references.reference_store import ReferenceTable
from orpo_mlx.types import SUMS_ALONE, Batch, Example, LogProbs, Wanted


class SecondModel(ReferenceLogProbs):
    """Log-probs under a model that is not the policy's, remembered per pair like any others.

    Args:
        scorer: of that model.
        config: its config, where it is another one than the policy's.
        is_start: whether it is the policy as it was before training.
        with_prompt: as in `ReferenceLogProbs`; so is `wanted`.
    """

    def __init__(
        self,
        scorer: PairScorer,
        config: Mapping[str, Any] | None = None,
        *,
        is_start: bool = False,
        with_prompt: bool = False,
        wanted: Wanted = SUMS_ALONE,
    ) -> None:
        super().__init__(scorer, adapters_are_new=True, is_start=is_start, with_prompt=with_prompt, wanted=wanted)
        # `scorer` follows the policy's when a run changes how it spends memory; this model stays as it is.
        self._own = scorer
        self._config = config

    @property
    def runner(self) -> PairScorer:
        """What computes the log-probs."""
        return self._own

    def keep_in(self, folder: Path, model_config: Mapping[str, Any]) -> None:
        """Remember in a file of `folder` as well; see `ReferenceLogProbs`."""
        super().keep_in(folder, model_config if self._config is None else self._config)

    def _reference_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _compute(self, pairs: Sequence[Example], batch: Batch) -> None:
        # The batch may be in a layout that only the policy takes.
        super()._compute(pairs, self._collate(pairs))


class CopiedReference(SecondModel):
    """Log-probs under a copy of the model, computed whenever they are asked for and never remembered.

    Args:
        scorer: of the copy.
        with_prompt: as in `ReferenceLogProbs`; so is `wanted`.
    """

    def keep_in(self, folder: Path, model_config: Mapping[str, Any]) -> None:
        """Nothing is kept."""

    def adopt(self, pairs: Sequence[Example], logps: LogProbs) -> None:
        """Nothing is kept."""

    def of_groups(self, groups: Sequence[Example], batch: Batch) -> GroupReference:
        """Log-probs of every completion under the copy."""
        logps = group_logps(self._own, batch, gradient=False).logps
        mx.eval(logps)
        return GroupReference(logps)

    def __call__(self, pairs: Sequence[Example], batch: Batch) -> ReferenceValues:
        """Log-probs of both sides under the copy."""
        tokens = self._nll_tokens_per_pair
        logps = pair_logps(self._own, batch, nll_tokens_per_pair=tokens, gradient=False, wanted=self._wanted)
        # Now: the copy's activations are gone before the step's own are made.
        mx.eval(logps)
        return ReferenceValues(logps.chosen, logps.rejected, logps.chosen_tail, logps.rejected_tail)

    def remember(
        self, groups: Iterable[Sequence[Example]], progress: Callable[[int], None] = lambda done: None
    ) -> None:
        """Nothing is kept: each step computes its own."""


class SyncedReference(SecondModel):
    """A reference that becomes, every `steps` optimiser steps, `tau` of the policy and 1 - `tau` of itself.

    π_ref <- τ π + (1 - τ) π_ref in the weights (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656, eqs. 4 and 5). What
    it has remembered is forgotten at that moment, and what it computes from then on is kept for this run alone.

    Args:
        scorer: of the reference, made of `twin_of` the policy.
        policy: the model that is trained.
        tau: the policy's share, above 0 and at most 1.
        steps: optimiser steps from one time to the next.
        is_start: as in `SecondModel`; so are the others.
    """

    def __init__(
        self,
        scorer: PairScorer,
        policy: nn.Module,
        tau: float,
        steps: int,
        *,
        is_start: bool = True,
        with_prompt: bool = False,
        wanted: Wanted = SUMS_ALONE,
    ) -> None:
        super().__init__(scorer, is_start=is_start, with_prompt=with_prompt, wanted=wanted)
        self._policy, self._tau, self._steps = policy, tau, steps
        self._moved = False

    def after_step(self, step: int) -> None:
        """Follow the policy, where it is time to."""
        if step % self._steps == 0:
            mix_into(self._own.model, self._policy, self._tau)
            self._forget()

    def weights(self) -> dict[str, mx.array]:
        """What can differ from the policy as it was loaded: the adapters, or the trained weights."""
        names = _moving(self._policy)
        return {name: array for name, array in _flat(self._own.model).items() if name in names}

    def restore(self, arrays: Mapping[str, mx.array], step: int) -> None:
        """Be what `weights` gave after `step` optimiser steps; ValueError where it is something else."""
        names = _moving(self._policy)
        if set(arrays) != names:
            raise ValueError("weights of another model")
        self._own.model.load_weights(list(arrays.items()), strict=False)
        # By then it has moved: rows of the shared file are of the weights it began with.
        if step >= self._steps:
            self._forget()

    def forget_if_moved(self) -> None:
        """Forget all log-probs, where this is no longer the model it began as."""
        if self._moved:
            self._forget()

    def _forget(self) -> None:
        self._moved = True
        self.table.save()
        notes = self.table.notes
        self.table = ReferenceTable()
        self.table.notes += notes


def copy_of(model: nn.Module, *, base: bool) -> nn.Module:
    """A model with buffers of its own, frozen and in evaluation mode.

    Args:
        model: the policy before its first step.
        base: whether to leave its adapters out: fresh ones change nothing.
    """
    twin = base_of(model) if base else twin_of(model)
    # A deep copy of an array shares its buffer until one of the two is computed anew.
    twin.update(tree_map(lambda array: array + mx.zeros((), array.dtype), twin.parameters()))
    mx.eval(twin.parameters())
    return twin


def base_of(model: nn.Module) -> nn.Module:
    """The model without its adapters, sharing its buffers; frozen, in evaluation mode."""
    with adapters_off(model):
        return twin_of(model)


def twin_of(model: nn.Module) -> nn.Module:
    """A model of the same arrays, frozen and in evaluation mode; an update of either leaves the other as it is."""
    twin = copy.deepcopy(model)
    twin.freeze()
    twin.eval()
    return twin


def without_effect(model: nn.Module) -> nn.Module:
    """The model with its LoRA adapters set to change nothing, and still there to be moved."""
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.zeros_like(module.lora_b)
    return model


def mix_into(reference: nn.Module, policy: nn.Module, tau: float) -> None:
    """Let the reference's weights become τ of the policy's and 1 - τ of its own.

    Of LoRA it is the product that is mixed, as the whole weights are where there are no adapters: both products stand
    side by side in one of a higher rank, until a dense matrix would be smaller.
    """
    trained = adapter_weights(policy)
    theirs = dict(policy.named_modules())
    mixed: dict[str, mx.array] = {}
    for name, module in reference.named_modules():
        if "lora_a" in module and tau < 1:
            a, b = joined(module, theirs[name], tau)
            mixed |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    own = _flat(reference)
    for name, array in trained.items():
        if name not in mixed:
            mixed[name] = array if tau == 1 else (tau * array + (1 - tau) * own[name]).astype(array.dtype)
    reference.load_weights(list(mixed.items()), strict=False)
    # Left lazy, they would hold on to the policy's weights, and their own, from before.
    mx.eval(reference.parameters())


def joined(reference: nn.Module, policy: nn.Module, tau: float) -> tuple[mx.array, mx.array]:
    """lora_a and lora_b whose product is τ of the policy's and 1 - τ of the reference's."""
    # mlx-lm's experts have (E, r, in) and (E, out, r), multiplied as b a; its other layers (in, r) and (r, out).
    experts = policy.lora_a.ndim == 3
    axes = (1, 2) if experts else (1, 0)
    a = mx.concatenate([policy.lora_a, reference.lora_a], axis=axes[0])
    b = mx.concatenate([tau * policy.lora_b, (1 - tau) * reference.lora_b], axis=axes[1])
    inputs, outputs = a.shape[2 if experts else 0], b.shape[1]
    if a.shape[axes[0]] <= min(inputs, outputs):
        return a, b
    # The same product at the least rank that holds any: one factor is the identity.
    product = b @ a if experts else a @ b
    identity = mx.eye(min(inputs, outputs), dtype=a.dtype)
    if experts:
        identity = mx.broadcast_to(identity, (a.shape[0], *identity.shape))
    return (identity, product) if inputs <= outputs else (product, identity)


def _flat(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def _moving(policy: nn.Module) -> set[str]:
    """Names of the weights in which a reference can come to differ from the policy as it was loaded."""
    return set(adapter_weights(policy))
