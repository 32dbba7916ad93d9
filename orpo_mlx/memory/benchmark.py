"""What methods cost side by side: memory and seconds of a training step, each method in a process of its own."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import mlx.core as mx

from orpo_mlx.config.flags import exit_status, why_it_died
from orpo_mlx.config.settings import TrainingConfig, settings_with
from orpo_mlx.config.traits import Trait
from orpo_mlx.data.batching import TrainingOrder, micro_batches
from orpo_mlx.data.sources import find_splits
from orpo_mlx.files import save_json
from orpo_mlx.process_memory import configure_allocator, peak_gib, process_footprint
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.references.reference_store import ReferenceTable
from orpo_mlx.training.run import Run, versions
from orpo_mlx.training.steps.step import optimiser_step
from orpo_mlx.types import Example

PROG = "orpo-mlx memory"
_GIB = 2**30

StepBatches = Sequence[Sequence[Example]]


class Timing(NamedTuple):
    """What some work on each step batch took."""

    seconds: list[float]
    """For each step batch."""
    peak_gib: float
    """Over all of them."""


def measure(config: TrainingConfig) -> dict[str, Any]:
    """Memory and seconds of `config.iters` optimiser steps, on rows in the order of the training order.

    Everything runs once to warm up before anything counts. Keys: `peak_memory_gib` (MLX's, over reference and step),
    `active_memory_gib` and `cache_memory_gib` (MLX's, after the last step), `footprint_gib` (the process, then) and
    `footprint_peak_gib` (at most, loading included); `step_s_median` with the reference remembered, `steps_s`;
    `reference_s`, the median per step of what the first epoch adds (0 without a reference); `pair_tokens_per_s`;
    `loss`, its mean in the pass that warms up, whose first step is that of the model as it was loaded.
    """
    configure_allocator()
    run = prepare(config)
    pairs = run.splits["train"].pairs
    step_size = config.batch_size * config.grad_accumulation_steps
    order = TrainingOrder(pairs, step_size, seed=config.seed, shuffle=config.shuffle)
    batches = [[pairs[index] for index in indices] for indices in itertools.islice(order, config.iters)]
    run.optimizer.init(run.loaded.model.trainable_parameters())
    run.loaded.model.train()
    reference = timed_reference(run, batches)
    # The first pass compiles and fills MLX's cache; the second is timed.
    losses = [optimiser_step(run, batch, step).means()["loss"] for step, batch in enumerate(batches, 1)]
    steps = timed(lambda batch: optimiser_step(run, batch, 0), batches)
    footprint = process_footprint()
    return {
        "peak_memory_gib": max(reference.peak_gib, steps.peak_gib),
        "active_memory_gib": mx.get_active_memory() / _GIB,
        "cache_memory_gib": mx.get_cache_memory() / _GIB,
        "footprint_gib": footprint.now_gib,
        "footprint_peak_gib": footprint.peak_gib,
        "step_s_median": statistics.median(steps.seconds),
        "steps_s": steps.seconds,
        "reference_s": statistics.median(reference.seconds),
        "pair_tokens_per_s": sum(pair.pair_tokens for batch in batches for pair in batch) / sum(steps.seconds),
        "loss": statistics.mean(losses),
    }


def timed_reference(run: Run, batches: StepBatches) -> Timing:
    """The reference log-probs of each step batch; leaves all of them remembered."""
    reference = run.reference
    if reference is None:
        return Timing([0.0], 0.0)

    def remember(batch: Sequence[Example]) -> None:
        reference.remember(micro_batches(batch, run.config.batch_size, run.config.micro_batch_tokens))

    def compute(batch: Sequence[Example]) -> None:
        # With an empty table, so that nothing is remembered already.
        known = reference.table
        reference.table = ReferenceTable()
        remember(batch)
        reference.table = known

    for batch in batches:
        remember(batch)
    return timed(compute, batches)


def timed(work: Callable[[Sequence[Example]], object], batches: StepBatches) -> Timing:
    """`work` on each step batch."""
    mx.reset_peak_memory()
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        work(batch)
        seconds.append(time.perf_counter() - started)
    return Timing(seconds, peak_gib())


def measure_methods(configs: Sequence[TrainingConfig], json_file: Path | None = None) -> dict[str, Any]:
    """Measure each method (in each mode) in a fresh process; what is known so far is in `json_file` after each.

    Args:
        configs: checked settings of each method, in each mode, on the same data.
        json_file: where to write the record.

    Returns:
        `methods`: for each a dictionary with `method`, `memory` (the mode), all `settings`, and the keys of `measure`,
        or `error` in their place where its process died; `versions`, `machine` and `date`.

    Raises:
        UserError: settings, data or model cannot be used.
    """
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), **device_facts()},
        "versions": versions(),
        "methods": [],
    }
    # So that data that is not there is found before the first model is loaded.
    find_splits(configs[0].data)
    for config in configs:
        print(f"Measuring {config.method} with --memory {config.memory} ...", file=sys.stderr, flush=True)
        settings = {"method": config.method, "memory": config.memory, "settings": config.settings()}
        record["methods"].append({**settings, **measure_in_a_process(config)})
        if json_file is not None:
            save_json(json_file, record)
    return record


def costs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: GiB and seconds, and their ratios to ORPO, or to the first method measured where ORPO is not."""
    measured = [row for row in rows if "error" not in row]
    base = next((row for row in measured if row["method"] == "orpo"), measured[0] if measured else None)
    memory = ("peak_memory_gib", "active_memory_gib", "cache_memory_gib", "footprint_gib")
    lines = [["method", "--memory", *(f"{name.removesuffix('_gib').replace('_memory', '')} GiB" for name in memory)]]
    lines[0] += ["step s", "first epoch step s", "pair tokens/s", "loss"]
    for row in rows:
        if base is None or "error" in row:
            lines.append([row["method"], row["memory"], row["error"], *["" for _ in lines[0][3:]]])
            continue
        cells = [_with_ratio(row[name], base[name]) for name in memory]
        cells.append(_with_ratio(row["step_s_median"], base["step_s_median"]))
        cells.append(_with_ratio(row["step_s_median"] + row["reference_s"], base["step_s_median"]))
        lines.append([row["method"], row["memory"], *cells, f"{row['pair_tokens_per_s']:.0f}", f"{row['loss']:.4f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    shown = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(f"| {line} |" for line in shown)


def _with_ratio(value: float, base: float) -> str:
    return f"{value:.2f}" + (f" ({value / base:.2f}x)" if base else "")


def device_facts() -> dict[str, Any]:
    """What MLX says of the device, where it does."""
    info = mx.device_info()
    return {key: info[key] for key in ("device_name", "memory_size", "max_recommended_working_set_size") if key in info}


def measure_in_a_process(config: TrainingConfig) -> dict[str, Any]:
    """What `measure` returns, from a process of its own; `error` where that dies.

    Raises:
        ConfigError: it ended with one sentence about its settings, data or model.
    """
    # MLX's peak and caches are of the whole process, and a method that runs out of memory is killed. Without a cache,
    # so that every method computes its own reference.
    with tempfile.TemporaryDirectory() as folder:
        settings = {**config.settings(), "adapter_path": folder}
        done = subprocess.run(
            [sys.executable, "-m", "orpo_mlx.memory.benchmark", json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "ORPO_MLX_CACHE": "off"},
        )
    why = why_it_died(done.returncode, done.stderr.splitlines(), PROG)
    if why is not None:
        return {"error": why}
    # The last line alone: libraries print to stdout, too.
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure_and_print(settings: Mapping[str, Any]) -> None:
    print(json.dumps(measure(TrainingConfig(**settings))))


def publishable_memory(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `compare_memory.py --publish` writes: figures, machine, versions and the settings that decide them.

    Of paths only the last part is kept.
    """
    settings = record["methods"][0]["settings"]
    kept = {name: settings[name] for name in settings_with(Trait.PUBLISHED)}
    if Path(kept["model"]).expanduser().exists():
        kept["model"] = PurePath(kept["model"]).name
    kept["data"] = PurePath(kept["data"]).name
    methods = [{key: value for key, value in row.items() if key != "settings"} for row in record["methods"]]
    return {
        "schema": 1,
        **{key: record[key] for key in ("date", "machine", "versions")},
        "settings": kept,
        "methods": methods,
    }


if __name__ == "__main__":
    sys.exit(exit_status(PROG, lambda: _measure_and_print(json.loads(sys.argv[1]))))
