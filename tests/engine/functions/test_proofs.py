"""Proofs at load: right functions pass in every dtype, and a wrong gradient is found, whichever function has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.device_profile import CPU, GPU, VARIABLE, DeviceProfile, device_profile
from orpo_mlx.engine import equivalence
from orpo_mlx.engine.equivalence import disagreement, product_error, relative_error
from orpo_mlx.engine.functions import patched_layers, proof_cases, proofs
from orpo_mlx.engine.functions.attention import attention
from orpo_mlx.engine.functions.patched_layers import ATTENTION, GATED_DELTA, LORA, SWIGLU
from orpo_mlx.engine.functions.proofs import HEAD, Proofs, prove_functions
from orpo_mlx.engine.lm_head import find_head
from orpo_mlx.models.adapters import add_adapters
from tests.conftest import make_model, quantise

TOKENS = mx.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]])
Function = Callable[..., Any]


def loaded(kind: str, dtype: mx.Dtype = mx.float32, *, quantised: bool = False, trained_head: bool = False) -> Any:
    """A model with a new adapter, whose B is 0."""
    model = make_model(kind)
    model.set_dtype(dtype)
    if quantised:
        quantise(model)
    keys = {"keys": ["self_attn.q_proj", "mlp.down_proj", *(["lm_head"] if trained_head else [])]}
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.0, **keys})
    mx.eval(model.parameters())
    return model


def proven(model: nn.Module, profile: DeviceProfile = CPU) -> Proofs:
    head = find_head(model)
    assert head is not None

    def run() -> mx.array:
        states: mx.array = head.backbone(TOKENS)
        return states.reshape(-1, states.shape[-1])

    return prove_functions(model, run, profile, 1 << 20, head)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize(("kind", "trained_head"), [("llama", False), ("llama", True), ("qwen3_5", False)])
def test_right_functions_are_proven(
    kind: str, trained_head: bool, dtype: mx.Dtype, quantised: bool, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, profile)
    found = proven(loaded(kind, dtype, quantised=quantised, trained_head=trained_head), device_profile())
    recurrent = {GATED_DELTA} if kind == "qwen3_5" else set()
    assert found == Proofs(frozenset({ATTENTION, SWIGLU, LORA, HEAD} | recurrent), ())


@pytest.mark.parametrize(
    ("kind", "called"),
    [
        ("sliding", {ATTENTION, SWIGLU}),
        ("mixtral", {ATTENTION, SWIGLU}),
        ("phi3", {ATTENTION, SWIGLU}),
        ("gemma4_shared", {ATTENTION}),
        # With attention of its own.
        ("gemma2", set()),
    ],
)
def test_what_a_model_does_not_call_is_left_out_without_a_word(kind: str, called: set[str]) -> None:
    assert proven(make_model(kind)) == Proofs(frozenset({*called, HEAD}), ())


def with_wrong_gradient(function: Function, spoil: Callable[[list[mx.array]], list[mx.array]]) -> Function:
    """The function with its own value, and with spoiled gradients towards its arguments."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        places = [number for number, each in enumerate(arguments) if isinstance(each, mx.array)]

        def call(*arrays: mx.array) -> Any:
            given = list(arguments)
            for place, array in zip(places, arrays, strict=True):
                given[place] = array
            return function(*given, **options)

        several = isinstance(call(*(arguments[place] for place in places)), tuple)
        spoiled: Any = mx.custom_function(call)

        @spoiled.vjp  # type: ignore[untyped-decorator]
        def backward(primals: Any, cotangents: Any, _: Any) -> Any:
            primals = list(primals) if isinstance(primals, (list, tuple)) else [primals]
            right = mx.vjp(call, primals, list(cotangents) if several else [cotangents])[1]
            wrong = spoil(list(right))
            return tuple(wrong) if len(wrong) > 1 else wrong[0]

        return spoiled(*(arguments[place] for place in places))

    return wrong


def scaled(gradients: list[mx.array]) -> list[mx.array]:
    return [(1.05 * each).astype(each.dtype) for each in gradients]


def turned(gradients: list[mx.array]) -> list[mx.array]:
    """One sign wrong."""
    return [-gradients[0], *gradients[1:]]


def without_last(gradients: list[mx.array]) -> list[mx.array]:
    """A term missing."""
    return [*gradients[:-1], mx.zeros_like(gradients[-1])]


SPOILED = pytest.mark.parametrize("spoil", [scaled, turned, without_last])
DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])


@SPOILED
@pytest.mark.parametrize(
    ("name", "where", "kind", "dtype"),
    [
        *((ATTENTION, "attention", "llama", dtype) for dtype in (mx.float32, mx.bfloat16, mx.float16)),
        *((SWIGLU, "swiglu", "llama", dtype) for dtype in (mx.float32, mx.bfloat16, mx.float16)),
        *((GATED_DELTA, "gated_delta_update", "qwen3_5", dtype) for dtype in (mx.float32, mx.bfloat16)),
    ],
)
def test_a_wrong_gradient_is_found(
    name: str, where: str, kind: str, dtype: mx.Dtype, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patched_layers, where, with_wrong_gradient(getattr(patched_layers, where), spoil))
    found = proven(loaded(kind, dtype))
    assert {ATTENTION, SWIGLU, LORA, HEAD} - {name} <= found.enabled
    assert name not in found.enabled
    (note,) = found.notes
    assert note.endswith(" off here.")
    assert " runs as mlx-lm wrote it: its gradient is " in note


@pytest.mark.parametrize("factor", [(1.05, 1, 1), (1, 1.05, 1), (1, 1, -1), (0, 1, 1)], ids=str)
@DTYPES
def test_a_wrong_gradient_of_lora_is_found(
    dtype: mx.Dtype, factor: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = patched_layers.lora_linear

    def wrong(layer: Any, x: mx.array) -> mx.array:
        # Towards x, A and B.
        parts = [x, layer.lora_a, layer.lora_b]
        parts = [
            (share * each + mx.stop_gradient((1 - share) * each)) for share, each in zip(factor, parts, strict=True)
        ]
        x, layer.lora_a, layer.lora_b = (each.astype(x.dtype) if each is parts[0] else each for each in parts)
        return own(layer, x)

    monkeypatch.setattr(patched_layers, "lora_linear", wrong)
    found = proven(loaded("llama", dtype), GPU)
    assert found.enabled == {ATTENTION, SWIGLU, HEAD}
    (note,) = found.notes
    assert note.startswith("LoRA runs as mlx-lm wrote it: its gradient is ")


@SPOILED
@DTYPES
@pytest.mark.parametrize("where", ["head_logps", "trained_head_logps"])
def test_a_wrong_gradient_of_the_head_is_found(
    where: str, dtype: mx.Dtype, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = getattr(proof_cases, where)

    def wrong(head: Any, hidden: mx.array, targets: mx.array, **options: Any) -> mx.array:
        result: mx.array = with_wrong_gradient(lambda hidden: own(head, hidden, targets, **options), spoil)(hidden)
        return result

    monkeypatch.setattr(proof_cases, where, wrong)
    found = proven(loaded("llama", dtype, trained_head=True))
    assert found.enabled == {ATTENTION, SWIGLU, LORA}
    (note,) = found.notes
    assert note.startswith("The head runs for all tokens at one time: its gradient is ")


def test_what_is_kept_for_the_backward_pass_is_proven_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention

    def wrong_where_kept(*arguments: Any, kept_bytes: int, **options: Any) -> mx.array:
        result: mx.array = own(*arguments, kept_bytes=kept_bytes, **options)
        return 1.1 * result if kept_bytes else result

    monkeypatch.setattr(patched_layers, "attention", wrong_where_kept)
    model = loaded("llama")
    assert ATTENTION not in proven(model).enabled
    # A GPU keeps none.
    assert ATTENTION in proven(model, GPU).enabled


def test_a_function_that_raises_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any, **__: Any) -> mx.array:
        raise RuntimeError("[metal] no such kernel.\nSecond line")

    monkeypatch.setattr(patched_layers, "swiglu", raises)
    found = proven(loaded("llama"))
    assert found.enabled == {ATTENTION, LORA, HEAD}
    assert found.notes == (
        "SwiGLU runs as mlx-lm wrote it: RuntimeError is raised here ([metal] no such kernel. Second line).",
    )


def test_a_model_that_raises_runs_as_it_was_written() -> None:
    def run() -> mx.array:
        raise RuntimeError("out of memory")

    found = prove_functions(loaded("llama"), run, CPU)
    assert found.enabled == frozenset()
    assert found.notes == ("All functions run as mlx-lm wrote them: RuntimeError is raised here (out of memory).",)


def test_each_kind_of_call_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def counted(ours: Function, theirs: Function, primals: Any) -> str | None:
        compared.append(str([each.shape for each in primals]))
        return disagreement(ours, theirs, primals)

    monkeypatch.setattr(proofs, "disagreement", counted)
    model = loaded("llama")
    proven(model)
    one = len(compared)
    model.model.layers *= 3
    proven(model)
    assert len(compared) == 2 * one


def test_nothing_of_the_model_is_changed() -> None:
    model = loaded("llama", trained_head=True)
    model.train()
    mx.random.seed(1)
    before: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    state: Any = mx.random.state
    key = np.array(state[0])
    proven(model)
    after: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    assert all(after[name] is value for name, value in before.items())
    assert (np.array(state[0]) == key).all()
    assert model.training


def test_float32_may_be_off_by_what_the_devices_products_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert product_error() == 0  # This is a CPU.
    x = mx.random.normal((4, 8))

    def off(x: mx.array) -> list[mx.array]:
        return [x * (1 + 1e-3)]

    assert disagreement(off, lambda x: [x], [x]) == "its value is 0.1 % off here"
    # TF32 has ten bits.
    monkeypatch.setattr(equivalence, "product_error", lambda: 3e-4)
    assert disagreement(off, lambda x: [x], [x]) is None
    assert disagreement(lambda x: [1.05 * x], lambda x: [x], [x]) == "its value is 5 % off here"


def test_what_is_no_number_is_no_agreement() -> None:
    x = mx.random.normal((4, 8))
    assert disagreement(lambda x: [x * mx.nan], lambda x: [x], [x]) == "its value is not finite or wholly off here"
    half = disagreement(lambda x: [x.astype(mx.float16)], lambda x: [x], [x])
    assert half == "its value is mlx.core.float16 instead of mlx.core.float32"
    assert relative_error(mx.zeros(3), mx.zeros(3)).item() == 0
    assert relative_error(mx.ones(3), mx.zeros(3)).item() == mx.inf
