"""Training on this machine: modes against each other, twenty steps against a CPU's, interrupt and resume.

`python -m orpo_mlx.doctor.training > orpo_mlx/doctor/cpu_steps.json`, on a CPU, makes the stored values anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_flatten
from rich.console import Console

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.doctor.findings import TF32_FROM, Finding, label_of, on_a_cpu, product_error, relative_error, tolerance
from orpo_mlx.doctor.package import (
    MEMORY_MODES,
    SHAPES,
    adapter_values,
    loss_and_gradients,
    made_pairs,
    make_model,
    make_run,
)
from orpo_mlx.errors import TrainingError
from orpo_mlx.reporting.callbacks import TrainingCallback
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.run_folder import ADAPTERS_FILE, METRICS_FILE
from orpo_mlx.train import train
from orpo_mlx.training.run import versions
from orpo_mlx.training.steps.step_functions import traced_at_once

STORED = "cpu_steps.json"
STEPS, INTERRUPTED_AFTER = 20, 7
_LOSS, _GRADIENT = 1e-5, 1e-4
"""How far, relative to it, a mode's loss and gradients may be from plain's in float32."""
_STEP_LOSS, _STEP_NORM, _TF32_TIMES = 1e-4, 1e-2, 10
"""How far the loss and the gradient's norm of a step may be from the CPU's, and how often that with TF32 products."""
_DEFAULT_LOSS = 0.05
"""How far the first loss of a run in bfloat16 may be from the CPU's in float32."""
# From one token on either side, so that attention is met with one to nine queries; then lengths that need padding.
_SHORT = [(1, 1, 2), (2, 3, 1), (4, 5, 8), (9, 9, 6)]


def check_modes(dtype: str, tokens: int, *, quantised: bool = False) -> Iterator[Finding]:
    """Loss and gradients of a step under each `--memory` against `plain`'s, and `plain`'s against a CPU's in float32.

    In half precision every way to compute them is off by rounding; a mode may be off, from float32, by twice what
    `plain` is, and by 1 % more.
    """
    long = [(tokens // 2, tokens // 2, tokens // 3), (tokens // 3, tokens // 5, tokens // 2)]
    for words, lengths, method in (("short pairs", _SHORT, "orpo"), ("long pairs", long, "dpo")):
        pairs = made_pairs(lengths)
        model = make_model("tiny", dtype, quantised=quantised)
        found = {mode: Step(*loss_and_gradients(model, mode, pairs, method)) for mode in MEMORY_MODES}
        if dtype == "float32" and mx.default_device() == mx.Device(mx.cpu):
            yield from against_plain(f"{label_of(dtype, quantised)}, {words}", dtype, found, found["plain"])
            continue
        with on_a_cpu():
            # Weights of 4 bits are packed into uint32, which are no numbers to convert.
            model.apply(lambda array: array.astype(mx.float32) if array.dtype != mx.uint32 else array)
            exact = Step(*loss_and_gradients(model, "plain", pairs, method))
        yield from against_plain(f"{label_of(dtype, quantised)}, {words}", dtype, found, exact)


class Step(NamedTuple):
    """What one optimiser step gave."""

    loss: float
    gradients: dict[str, mx.array]

    def errors(self, other: Step) -> tuple[float, float]:
        """Relative errors of loss and gradients."""
        ours, theirs = (_flat(step.gradients) for step in (self, other))
        return abs(self.loss - other.loss) / abs(other.loss), relative_error(ours, theirs)


def _flat(arrays: dict[str, mx.array]) -> mx.array:
    return mx.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)])


def against_plain(label: str, dtype: str, found: dict[str, Step], exact: Step) -> Iterator[Finding]:
    plain = found["plain"]
    rounding = plain.errors(exact)
    allowed = tolerance(dtype)
    for mode, step in found.items():
        if mode == "plain":
            errors, limits, what = rounding, (10 * allowed, 10 * allowed), "float32 on a CPU"
        elif dtype == "float32":
            scale = allowed / 1e-4
            errors, limits, what = step.errors(plain), (_LOSS * scale, _GRADIENT * scale), "plain"
        else:
            errors, limits, what = (
                step.errors(exact),
                (2 * rounding[0] + 0.01, 2 * rounding[1] + 0.01),
                "float32 on a CPU",
            )
        passed = all(error <= limit for error, limit in zip(errors, limits, strict=True))
        sentence = f"loss {errors[0]:.1e} and gradients {errors[1]:.1e} off {what}, allowed {limits[0]:.0e}, "
        figures = {"loss": step.loss, "loss_error": errors[0], "gradient_error": errors[1], "tolerances": list(limits)}
        yield Finding("modes", f"{mode}, {label}", passed, f"{sentence}{limits[1]:.0e}", figures)


def check_training() -> Iterator[Finding]:
    """Twenty steps of `train` against a CPU's, then the same run interrupted and resumed."""
    with tempfile.TemporaryDirectory(prefix="orpo_mlx-") as name, patch.dict(os.environ, {"ORPO_MLX_CACHE": "off"}):
        folder = Path(name)
        write_inputs(folder)
        rows, first = train_in(folder, "first")
        yield against_stored(rows)
        _, resumed = train_in(folder, "resumed", interrupted=True)
        equal = all(bool(mx.array_equal(first[name], resumed[name]).item()) for name in first)
        # What is not equal may be the device's doing: then the same run twice is not equal either.
        _, second = (None, first) if equal else train_in(folder, "second")
    yield resumed_finding(first, second, resumed)


def check_defaults() -> Iterator[Finding]:
    """Three steps of `train` on a model in bfloat16, as the Hub has them, with every setting left at its default that
    can be."""
    with tempfile.TemporaryDirectory(prefix="orpo_mlx-") as name, patch.dict(os.environ, {"ORPO_MLX_CACHE": "off"}):
        folder = Path(name)
        write_inputs(folder, "bfloat16")
        config = TrainingConfig(
            model=str(folder / "model"),
            data=str(folder / "train.jsonl"),
            adapter_path=str(folder / "run"),
            resume_adapter_file=str(folder / ADAPTERS_FILE),
            iters=3,
            batch_size=2,
            steps_per_report=1,
        )
        train(config, Reporter(Console(quiet=True)))
        rows, _ = written(folder / "run")
    yield near_stored(rows)


def near_stored(rows: list[dict[str, float]]) -> Finding:
    """The first step's loss, before adapters have moved, is that of float32 on a CPU but for bfloat16's rounding."""
    expected = stored_steps()["loss"][0]
    error = abs(rows[0]["loss"] - expected) / expected
    sentence = f"the first step's loss is {error:.1e} off float32's on a CPU, allowed {_DEFAULT_LOSS:.0e}"
    figures = {"losses": [row["loss"] for row in rows], "loss_error": error}
    return Finding("training", "settings left at their defaults", error <= _DEFAULT_LOSS, sentence, figures)


def stored_steps() -> dict[str, Any]:
    """What `STORED` holds; see `stored_values`."""
    found: dict[str, Any] = json.loads(files("orpo_mlx.doctor").joinpath(STORED).read_text(encoding="utf-8"))
    return found


def against_stored(rows: list[dict[str, float]]) -> Finding:
    stored = stored_steps()
    times = _TF32_TIMES if product_error() > TF32_FROM else 1
    errors = {}
    for key, limit in (("loss", _STEP_LOSS * times), ("grad_norm", _STEP_NORM * times)):
        pairs = zip([row[key] for row in rows], stored[key], strict=True)
        errors[key] = (max(abs(found - expected) / abs(expected) for found, expected in pairs), limit)
    passed = all(error <= limit for error, limit in errors.values())
    sentence = "; ".join(f"{key} {error:.1e} off, allowed {limit:.0e}" for key, (error, limit) in errors.items())
    figures = {"steps": STEPS, "losses": [row["loss"] for row in rows]} | {
        f"{key}_error": error for key, (error, _) in errors.items()
    }
    return Finding("training", f"{STEPS} steps against a CPU's", passed, sentence, figures)


def resumed_finding(first: dict[str, mx.array], second: dict[str, mx.array], resumed: dict[str, mx.array]) -> Finding:
    """Resumed runs must be equal bit for bit wherever the same run twice is; elsewhere they may be as far apart."""
    repeats, resumes = (
        all(bool(mx.array_equal(first[name], other[name]).item()) for name in first) for other in (second, resumed)
    )
    noise, error = (relative_error(_flat(other), _flat(first)) for other in (second, resumed))
    passed = resumes or (not repeats and error <= 10 * noise)
    sentence = f"interrupted after step {INTERRUPTED_AFTER} and resumed: " + (
        "equal bit for bit" if resumes else f"adapters differ by {error:.1e}"
    )
    if not repeats:
        sentence += f"; the same run twice differs by {noise:.1e} on this device"
    figures = {"resumed_equal": resumes, "repeated_equal": repeats, "resumed_error": error, "repeated_error": noise}
    return Finding("training", "interrupt and resume", passed, sentence, figures)


def write_inputs(folder: Path, dtype: str = "float32") -> None:
    """A model in a dtype, adapters to begin with, and pairs, as `train` reads them."""
    model = make_model("tiny", dtype)
    (folder / "model").mkdir()
    mx.save_safetensors(str(folder / "model" / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "model" / "config.json").write_text(json.dumps(SHAPES["tiny"]), encoding="utf-8")
    make_run(model, "plain", 1)
    mx.save_safetensors(str(folder / ADAPTERS_FILE), adapter_values(model))
    lengths = [(3 + 5 * number % 17, 2 + 7 * number % 13, 4 + 3 * number % 11) for number in range(24)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    lines = [json.dumps({name: list(getattr(pair, name)) for name in names}) for pair in made_pairs(lengths)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_in(
    folder: Path, name: str, *, interrupted: bool = False
) -> tuple[list[dict[str, float]], dict[str, mx.array]]:
    """Train with `train` itself, or interrupt it and go on with `--resume`: metrics of each step, and the adapters.

    What is asserted here holds whatever the device; an exception of it is found as any other is.
    """
    config = TrainingConfig(
        model=str(folder / "model"),
        data=str(folder / "train.jsonl"),
        adapter_path=str(folder / name),
        resume_adapter_file=str(folder / ADAPTERS_FILE),
        iters=STEPS,
        batch_size=2,
        memory="fast",
        dtype="float32",
        learning_rate=5e-4,
        steps_per_report=1,
        samples=0,
        report=False,
        memory_check=False,
        max_grad_norm=1.0,
    )
    quiet = Reporter(Console(quiet=True))
    # A resumed run counts anew how often it meets shapes: a step that is compiled in one run and plain in the other may
    # differ in rounding.
    with traced_at_once():
        if interrupted:
            try:
                train(config, quiet, callbacks=[_EndsTheRun()])
            except TrainingError:
                config = dataclasses.replace(config, resume=True)
        train(config, quiet)
    return written(folder / name)


def written(run: Path) -> tuple[list[dict[str, float]], dict[str, mx.array]]:
    """What a run's folder holds: metrics of each step, and the adapters."""
    lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "grad_norm" in row]
    adapters = mx.load(str(run / ADAPTERS_FILE))
    assert isinstance(adapters, dict)
    return rows, adapters


class _EndsTheRun(TrainingCallback):
    def on_train_loss_report(self, train_info: dict[str, Any], /) -> None:
        if train_info["iteration"] == INTERRUPTED_AFTER:
            raise RuntimeError("interrupted on purpose")


def stored_values() -> dict[str, Any]:
    """What `STORED` holds: loss and gradient norm of each step on this machine's CPU."""
    mx.set_default_device(mx.Device(mx.cpu))
    with tempfile.TemporaryDirectory(prefix="orpo_mlx-") as name:
        write_inputs(Path(name))
        rows, _ = train_in(Path(name), "run")
    kept = {key: versions()[key] for key in ("mlx", "mlx-lm")}
    return {"versions": kept, **{key: [row[key] for row in rows] for key in ("loss", "grad_norm")}}


if __name__ == "__main__":
    print(json.dumps(stored_values(), indent=1))
