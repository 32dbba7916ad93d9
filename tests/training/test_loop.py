"""A run that ends early, by a signal or an error, and what falls due along the way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.errors import DeviceError
from orpo_mlx.training.steps.gradients import step_gradient
from tests.helpers.quiet_training import flags, rows, run_quietly
from tests.test_errors import IGNORED, OUT_OF_MEMORY, TIMEOUT


def fail_at(step: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gradient of that step raise."""
    calls = itertools.count(1)

    def gradient(*args: Any) -> Any:
        if next(calls) == step:
            raise error
        return step_gradient(*args)

    monkeypatch.setattr("orpo_mlx.training.steps.step.step_gradient", gradient)


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (KeyboardInterrupt(), 130, "interrupted: step 2 is saved, go on with"),
        (
            RuntimeError("[METAL] out\nof memory."),
            2,
            "error: step 3: [METAL] out of memory; the GPU failed: start the command again; "
            "step 2 is saved, go on with",
        ),
    ],
)
def test_a_run_that_ends_early_saves_what_it_learned(
    settings: dict[str, Any],
    tmp_path: Path,
    error: BaseException,
    status: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_quietly({**settings, "iters": 2, "adapter_path": str(tmp_path / "two steps")})
    fail_at(3, error, monkeypatch)
    assert main([*flags(settings), "--iters", "5"]) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert expected in err
    assert f"orpo-mlx train --resume --adapter-path {settings['adapter_path']}" in err
    saved, two_steps = (
        (Path(folder) / "adapters.safetensors").read_bytes()
        for folder in (settings["adapter_path"], tmp_path / "two steps")
    )
    assert saved == two_steps


@pytest.mark.parametrize("runs", [mx.cpu, None])
def test_after_an_error_of_the_gpu_the_last_step_is_saved_on_the_cpu(
    settings: dict[str, Any], runs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    streams: list[Any] = []

    @contextmanager
    def stream(where: Any) -> Iterator[None]:
        streams.append(where)
        yield
        streams.pop()

    def isfinite(array: mx.array) -> mx.array:
        if runs is None or runs not in streams:
            raise RuntimeError(IGNORED)
        return array == array

    fail_at(3, RuntimeError(TIMEOUT), monkeypatch)
    monkeypatch.setattr(mx, "stream", stream)
    monkeypatch.setattr(mx, "isfinite", isfinite)
    assert main([*flags(settings), "--iters", "5"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "kIOGPUCommandBufferCallbackErrorTimeout); a piece of work took the GPU too long: lower --micro-batch" in err
    assert ("step 2 is saved, go on with" in err) is (runs is not None)
    assert ("step 2 cannot be saved: [METAL]" in err) is (runs is None)


def test_the_gpus_errors_before_the_first_step_are_one_sentence(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluated(*_: Any, **__: Any) -> None:
        raise RuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr("orpo_mlx.training.loop.evaluate_splits", evaluated)
    assert main(flags(settings)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "ErrorOutOfMemory); memory has run out: lower --micro-batch-tokens, take --memory thrift, or cut" in err
    with pytest.raises(DeviceError, match="`micro_batch_tokens`"):
        run_quietly({**settings, "overwrite": True})


def test_an_interrupt_in_the_first_step_says_that_nothing_was_saved(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(1, KeyboardInterrupt(), monkeypatch)
    assert main(flags(settings)) == 130
    assert "nothing was saved" in capsys.readouterr().err


def test_saves_along_the_way_and_a_schedule(settings: dict[str, Any]) -> None:
    schedule = {"name": "linear_schedule", "arguments": [1e-3, 0.0, 4]}
    run_quietly({**settings, "iters": 4, "save_every": 2, "steps_per_eval": 2, "lr_schedule": schedule})
    saved = sorted(path.name for path in (Path(settings["adapter_path"]) / "checkpoints").iterdir())
    assert saved == ["step-0000002", "step-0000004"]
    assert [row["step"] for row in rows(settings, "valid")] == [0, 2, 4]
    rates = [row["learning_rate"] for row in rows(settings, "train")]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]
