"""Proof, when a model is loaded, that this package's functions give what mlx-lm's give, gradients included.

The model is traced once on a few tokens, which shows what its layers call, with which shapes and dtypes. Each function
is then compared by itself, with native autodiff of the one it stands in for, on random numbers of those shapes
(`proof_cases`). One by one, since in half precision the rounding of a layer is blown up by those that follow: whole
models of 24 layers differ by 10 % and more between two right ways to compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from orpo_mlx.device_profile import DeviceProfile
from orpo_mlx.engine.equivalence import disagreement, without_dropout
from orpo_mlx.engine.functions.attention import KEPT_BYTES
from orpo_mlx.engine.functions.patched_layers import (
    ATTENTION,
    GATED_DELTA,
    LORA,
    SWIGLU,
    Function,
    exchanged,
    exchanges,
)
from orpo_mlx.engine.functions.proof_cases import CASES, Case, head_cases
from orpo_mlx.engine.lm_head import ModelHead
from orpo_mlx.errors import reason_of

HEAD = "head"
_TITLES = {ATTENTION: "Attention", SWIGLU: "SwiGLU", LORA: "LoRA", GATED_DELTA: "The gated delta rule"}


class Proofs(NamedTuple):
    """What was proven of a model's functions."""

    enabled: frozenset[str]
    """Names of the functions that agree: those of `patched_layers`, and "head"."""
    notes: tuple[str, ...]
    """A sentence for the user about each that does not."""


class Call(NamedTuple):
    """One call of a function by a layer."""

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def prove_functions(
    model: nn.Module,
    run: Callable[[], mx.array],
    profile: DeviceProfile,
    kept_bytes: int = KEPT_BYTES,
    head: ModelHead | None = None,
) -> Proofs:
    """Which of this package's functions the model's layers may call, and whether its head may run in tiles.

    A function that disagrees with mlx-lm's, or raises anything, is left out with a note. One that the model does not
    call is left out without.

    Args:
        model: an mlx-lm model with its adapters.
        run: calls its layers on a few tokens and returns the states (N, H) that its head is given; neither need be
            evaluated.
        profile: of the device.
        kept_bytes: see `attention`.
        head: the model's head, where it could be told apart.
    """
    with without_dropout(model):
        try:
            calls, states = recorded_calls(model, run, profile)
        except Exception as error:
            return Proofs(frozenset(), (f"All functions run as mlx-lm wrote them: {_raised(error)}.",))
        reasons: dict[str, str | None] = {}
        for call in calls:
            reason = why_not(partial(CASES[call.name], profile, kept_bytes, *call.arguments, **call.options))
            reasons[call.name] = reasons.get(call.name) or reason
        notes = [f"{_TITLES[name]} runs as mlx-lm wrote it: {why}." for name, why in reasons.items() if why]
        if head is not None:
            reasons[HEAD] = why_not(partial(head_cases, head, states, profile))
            if reasons[HEAD]:
                notes.append(f"The head runs for all tokens at one time: {reasons[HEAD]}.")
    return Proofs(frozenset(name for name, why in reasons.items() if why is None), tuple(notes))


def why_not(cases: Callable[[], Iterator[Case]]) -> str | None:
    """Why a function cannot be taken, in a clause; None where it agrees in all cases."""
    try:
        return next(filter(None, (disagreement(*case) for case in cases())), None)
    except Exception as error:
        return _raised(error)


def _raised(error: Exception) -> str:
    return f"{type(error).__name__} is raised here ({reason_of(error)})"


def recorded_calls(
    model: nn.Module, run: Callable[[], mx.array], profile: DeviceProfile
) -> tuple[list[Call], mx.array]:
    """One call of each kind, and what `run` returned."""
    calls: dict[Any, Call] = {}

    def recording(name: str, theirs: Function) -> Function:
        def record(*arguments: Any, **options: Any) -> Any:
            call = Call(name, arguments, options)
            calls.setdefault((name, *_KINDS[name](*arguments, **options)), call)
            return theirs(*arguments, **options)

        return record

    functions = {name: recording(name, each.theirs) for name, each in exchanges(profile).items()}
    with exchanged(model, functions):
        states = run()
    return list(calls.values()), states


def attention_kind(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **_: Any) -> tuple[Any, ...]:
    seen = (mask.ndim, mask.dtype) if isinstance(mask, mx.array) else mask
    return q.shape[1], q.dtype, k.shape[1], k.dtype, v.shape[-1], v.dtype, q.shape[-1], seen


def lora_kind(layer: LoRALinear, x: mx.array) -> tuple[Any, ...]:
    parameters: dict[str, mx.array] = dict(tree_flatten(layer.parameters()))
    shapes = tuple((name, each.shape, each.dtype) for name, each in sorted(parameters.items()))
    return type(layer.linear), shapes, x.dtype


def gated_delta_kind(q: mx.array, k: mx.array, v: mx.array, a: mx.array, *_: Any, **__: Any) -> tuple[Any, ...]:
    return k.shape[2:], v.shape[2:], a.shape[2:], q.dtype


_KINDS: dict[str, Callable[..., tuple[Any, ...]]] = {
    ATTENTION: attention_kind,
    SWIGLU: lambda gate, up: (gate.shape[-1], gate.dtype, up.dtype),
    LORA: lora_kind,
    GATED_DELTA: gated_delta_kind,
}
"""What tells calls of a function apart, beside the number of rows and tokens."""
