"""The gradient of a window does not depend on the batches it is cut into."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.device_profile import VARIABLE
from orpo_mlx.losses.registry import METHODS, PAIR
from orpo_mlx.training.references.reference import ReferenceLogProbs
from orpo_mlx.training.steps.gradients import step_gradient
from orpo_mlx.training.steps.step_functions import gradient_norm, traced_at_once
from tests.helpers.quiet_training import make_run

MODES_BUT_PLAIN = ["fast", "balanced", "thrift"]


# The normaliser of the NLL matters to losses that have the term.
@pytest.mark.parametrize(
    ("method", "nll"),
    [
        *((method, "completion") for method in (*METHODS, "aot + ld_dpo + wpo")),
        *((method, "sequence") for method in ("orpo", "cpo")),
    ],
)
def test_an_accumulation_window_equals_the_big_batch(settings: dict[str, Any], method: str, nll: str) -> None:
    results = []
    for size, windows, tokens in ((6, 1, 2048), (2, 3, 2048), (6, 1, 60)):
        sizes = {"batch_size": size, "grad_accumulation_steps": windows, "micro_batch_tokens": tokens}
        run = make_run(settings, method=method, nll=nll, **sizes)
        window = run.splits["train"].pairs
        found = step_gradient(run, window)
        flat = {name: np.array(value, np.float64) for name, value in found.gradients.items()}
        results.append((found.means.means()["loss"], flat))
    for total, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        for name, value in gradients.items():
            expected = results[0][1][name]
            # alphapo's reward is an exponential, here of mean log-probs of about -10: it magnifies their rounding.
            tolerance = 1e-4 if method == "alphapo" else 1e-5
            np.testing.assert_allclose(
                value, expected, rtol=0, atol=tolerance * max(1e-3, np.abs(expected).max()), err_msg=name
            )


# Every method with one mode in turn, and those that differ in what they need of a step with all.
@pytest.mark.parametrize(
    ("method", "memories"),
    [
        *((method, [MODES_BUT_PLAIN[number % 3]]) for number, method in enumerate(METHODS)),
        *((method, MODES_BUT_PLAIN) for method in ("orpo", "dpo", "aot")),
    ],
)
def test_memory_modes_change_no_number(settings: dict[str, Any], method: str, memories: list[str]) -> None:
    results = []
    for memory in ("plain", *memories):
        # Prompts through the head as well, where the method has a use for them.
        nll = "sequence" if METHODS[method].unit == PAIR else "completion"
        run = make_run(settings, method=method, memory=memory, nll=nll, batch_size=6)
        assert not run.memory.notes
        found = step_gradient(run, run.splits["train"].pairs)
        results.append((found.means.means()["loss"], found.gradients))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert gradients.keys() == results[0][1].keys()
        for name, expected in results[0][1].items():
            scale = max(1e-3, float(mx.abs(expected).max()))
            np.testing.assert_allclose(
                np.array(gradients[name]), np.array(expected), rtol=0, atol=1e-4 * scale, err_msg=name
            )


def test_a_compiled_step_is_the_plain_one(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "gpu")
    results = []
    for around in (nullcontext(), traced_at_once()):
        with around:
            run = make_run(settings, batch_size=2, grad_accumulation_steps=2)
        pairs = run.splits["train"].pairs[:4]
        for _ in range(2):
            found = step_gradient(run, pairs)
        results.append((run.functions.add_micro_batch.traced, found))
    (none, plain), (some, compiled) = results
    assert none == 0 < some
    assert compiled.norm == pytest.approx(plain.norm, rel=1e-5)
    assert compiled.means.means()["loss"] == pytest.approx(plain.means.means()["loss"], rel=1e-6)


def test_no_reference_is_waited_for_between_micro_batches(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(settings, method="dpo", batch_size=1)
    events: list[str] = []
    compute, add = ReferenceLogProbs._compute, run.functions.add_micro_batch

    def counted(event: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            events.append(event)
            return function(*given)

        return call

    monkeypatch.setattr(ReferenceLogProbs, "_compute", counted("reference", compute))
    monkeypatch.setattr(run.functions, "add_micro_batch", counted("gradient", add))
    step_gradient(run, run.splits["train"].pairs[:3])
    assert events == ["reference"] * 3 + ["gradient"] * 3


def test_gradient_norm_is_over_everything() -> None:
    tree = {"a": mx.array([3.0, 0.0]), "b.0": mx.array([[4.0]], mx.float16), "b.1": mx.array(12.0)}
    assert float(gradient_norm(tree)) == pytest.approx(13.0)
