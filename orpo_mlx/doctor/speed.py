"""What a step costs on this machine, and what mlx-lm-lora takes for it."""

from __future__ import annotations

import gc
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.optimizers as optim

from orpo_mlx.doctor.findings import Finding, Sizes, label_of, reason_of
from orpo_mlx.doctor.package import (
    made_pairs,
    make_model,
    make_run,
    predicted_peak,
    step_once,
    with_lora,
)
from orpo_mlx.run_folder import ADAPTERS_FILE

_GIB = 2**30
RIVAL = "mlx-lm-lora"
_WARM_UPS = 2
_JUDGED_FROM_GIB = 0.5
"""Smaller peaks are mostly what a device rounds allocations up to, and predictions of them are not judged."""
_PREDICTED_WITHIN = 0.2


class Evaluations:
    """Counts `mx.eval` and `mx.async_eval` within `counted`, and the seconds spent in them."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What waits for the device without them (`item`, `float`, `np.array`) is not seen: it counts as the host's."""
        with ExitStack() as stack:
            for name in ("eval", "async_eval"):
                stack.enter_context(patch.object(mx, name, self.timed(getattr(mx, name))))
            yield

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arrays: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arrays)
            finally:
                self.count += 1
                self.seconds += time.perf_counter() - started

        return call


def check_steps(shape: str, sizes: Sizes, dtype: str, mode: str, *, quantised: bool = False) -> Iterator[Finding]:
    """Seconds, evaluations and peak of an optimiser step of two pairs, and its predicted peak."""
    prompt, completion = sizes.pair
    pairs = made_pairs([(prompt, completion, completion)] * 2, shape)
    gc.collect()  # What an earlier check held in a cycle would be freed in between.
    predicted = predicted_peak(shape, dtype, mode, pairs, quantised=quantised)
    # The models of the prediction, freed later, would make the step's peak look smaller.
    gc.collect()
    before = mx.get_active_memory()
    model = make_model(shape, dtype, quantised=quantised)
    run = make_run(model, mode, len(pairs))
    for number in range(_WARM_UPS):
        step_once(run, pairs, number + 1)
    mx.clear_cache()
    mx.reset_peak_memory()
    evaluations, taken = Evaluations(), []
    with evaluations.counted():
        for number in range(sizes.steps):
            started = time.perf_counter()
            step_once(run, pairs, number + 1 + _WARM_UPS)
            taken.append(time.perf_counter() - started)
    peak = (mx.get_peak_memory() - before) / _GIB
    step_s = statistics.median(taken)
    host_s = (sum(taken) - evaluations.seconds) / sizes.steps
    judged = predicted >= _JUDGED_FROM_GIB
    passed = abs(peak / predicted - 1) <= _PREDICTED_WITHIN if judged else None
    figures = {
        "shape": shape,
        "dtype": dtype,
        "bits": 4 if quantised else None,
        "mode": mode,
        "pair": [prompt, completion],
        "step_s": step_s,
        "steps_s": taken,
        "host_s": host_s,
        "evals": evaluations.count / sizes.steps,
        "pair_tokens_per_s": sum(pair.pair_tokens for pair in pairs) / step_s,
        "peak_gib": peak,
        "predicted_gib": predicted,
    }
    name = f"{shape}, {label_of(dtype, quantised)}, {mode}"
    sentence = (
        f"{step_s:.3f} s a step ({host_s:.3f} s of them the host's), {figures['evals']:.0f} evaluations, "
        f"peak {peak:.2f} GiB, predicted {predicted:.2f}"
    )
    yield Finding("speed", name, passed, sentence, figures)


def check_rival(shape: str, sizes: Sizes, dtype: str, *, quantised: bool = False) -> Iterator[Finding]:
    """Seconds and peak of its `train_orpo` on two pairs, step by step as it reports them."""
    try:
        found = version(RIVAL)
    except PackageNotFoundError:
        sentence = f"{RIVAL} is not installed, so nothing is compared; pip install {RIVAL} (Python 3.11 and newer)"
        yield Finding("rival", RIVAL, None, sentence)
        return
    prompt, completion = sizes.pair
    pairs = made_pairs([(prompt, completion, completion)] * 2, shape)
    rows = [
        {
            "chosen": [*pair.prompt_ids, *pair.chosen_ids],
            "rejected": [*pair.prompt_ids, *pair.rejected_ids],
            "chosen_prompt_length": prompt,
            "rejected_prompt_length": prompt,
        }
        for pair in pairs
    ]
    gc.collect()
    before = mx.get_active_memory()
    model = with_lora(make_model(shape, dtype, quantised=quantised))
    try:
        reports = _train(model, rows, sizes.steps + _WARM_UPS, prompt + completion)[_WARM_UPS:]
    except Exception as error:  # Theirs, whatever it is: no fault of this package.
        yield Finding(
            "rival", RIVAL, None, f"{RIVAL} {found} cannot train here: {reason_of(error)}", {"version": found}
        )
        return
    step_s = statistics.median(1 / report["iterations_per_second"] for report in reports)
    # Reported in GB, as by mlx-lm's trainer; all else here is in GiB.
    peak = reports[-1]["peak_memory"] * 1e9 / 2**30 - before / 2**30
    figures = {
        "version": found,
        "shape": shape,
        "dtype": dtype,
        "bits": 4 if quantised else None,
        "step_s": step_s,
        "peak_gib": peak,
        "pair": [prompt, completion],
    }
    name = f"{RIVAL} {found}, {shape}, {label_of(dtype, quantised)}"
    yield Finding("rival", name, None, f"{step_s:.3f} s a step, peak {peak:.2f} GiB", figures)


def _train(model: Any, rows: list[dict[str, Any]], steps: int, longest: int) -> list[dict[str, Any]]:
    trainer = importlib.import_module("mlx_lm_lora.trainer.orpo_trainer")
    callbacks = importlib.import_module("mlx_lm.tuner.callbacks")
    reports: list[dict[str, Any]] = []

    class Reports(callbacks.TrainingCallback):  # type: ignore[name-defined]
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            reports.append(train_info)

    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        arguments = trainer.ORPOTrainingArgs(
            batch_size=len(rows),
            iters=steps,
            steps_per_report=1,
            steps_per_save=10 * steps,
            steps_per_eval=10 * steps,
            max_seq_length=longest,
            adapter_file=str(Path(folder) / ADAPTERS_FILE),
        )
        optimiser = optim.AdamW(learning_rate=1e-4)
        trainer.train_orpo(model, optimiser, rows, args=arguments, training_callback=Reports())
    return reports
