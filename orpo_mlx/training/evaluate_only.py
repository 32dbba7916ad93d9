"""`--test`: adapters that are there, judged on the held-out splits. Nothing is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx

from orpo_mlx.config.checks import check_settings
from orpo_mlx.config.settings import TrainingConfig, settings_with
from orpo_mlx.config.traits import Trait
from orpo_mlx.data.batching import length_order
from orpo_mlx.errors import ConfigError, ModelError
from orpo_mlx.files import read_json_table
from orpo_mlx.models.adapters import load_adapter_file
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.metrics_log import MetricsFile
from orpo_mlx.training.checkpoints.progress import TrainingResult
from orpo_mlx.training.data_order import held_out_pairs, steps_taken
from orpo_mlx.training.distributed import Ranks
from orpo_mlx.training.evaluation import evaluate_splits
from orpo_mlx.training.interrupts import StopSignals
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.run import Run

METRICS = "test_metrics.jsonl"
_CONFIG = "adapter_config.json"


def settings_of_adapters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the adapters under test were made with, as far as held-out figures depend on them.

    They are in the `run.json` beside the adapters, or, of adapters that mlx-lm made, in `adapter_config.json`.

    Args:
        values: the settings that were given.

    Raises:
        ConfigError: a file there holds none.
    """
    folder = _folder(
        _adapters(values.get("resume_adapter_file"), values.get("adapter_path", TrainingConfig.adapter_path))
    )
    for path, table in ((folder / "run.json", _run_settings(folder)), (folder / _CONFIG, _table(folder / _CONFIG))):
        if table:
            decisive = settings_with(Trait.EVALUATED)
            return check_settings({name: table[name] for name in decisive if name in table}, str(path))
    return {}


def evaluate_only(config: TrainingConfig, reporter: Reporter, ranks: Ranks) -> TrainingResult:
    """Evaluate the held-out splits with the adapters that `config` names; `test_metrics.jsonl` in
    `config.adapter_path` has the figures.

    The reference, for methods with one, is the model without the adapters.

    Returns:
        The metrics by split, as those after the steps that made the adapters; nothing of how these were made.

    Raises:
        UserError: settings, data, model or adapters cannot be used.
    """
    if ranks.size > 1:
        raise ConfigError("--test: evaluates on one process; leave out mlx.launch.")
    adapters = _adapters(config.resume_adapter_file, config.adapter_path)
    if not adapters.exists() or (adapters.is_dir() and not any(adapters.glob("adapter*.safetensors"))):
        raise ModelError(
            f"--test: no adapters in {adapters}; give the folder of a run with --adapter-path, or a file with "
            "--resume-adapter-file."
        )
    run = prepare(dataclasses.replace(config, resume_adapter_file=None), ranks=ranks)
    if not held_out_pairs(run):
        raise ConfigError("--test: --val-batches 0 and --test-batches 0 leave nothing to evaluate; raise one of them.")
    for name, split in run.splits.items():
        reporter.say(split.summary(name))
    note = _other_reference(run, adapters)
    if note is not None:
        reporter.say(note)
    step = steps_taken(adapters)
    try:
        with StopSignals() as stop:
            _precompute_reference(run, reporter, stop)
            load_adapter_file(run.loaded.model, adapters, config.lora_parameters["scale"])
            with closing(MetricsFile(run.folder / METRICS)) as metrics_file:
                held = evaluate_splits(
                    run, ("valid", "test"), step=step, untrained=False, reporter=reporter,
                    metrics_file=metrics_file, stop=stop,
                )  # fmt: skip
    finally:
        if run.reference is not None:
            run.reference.table.save()
    reporter.closing_table({}, held)
    reporter.say(f"\nAdapters of {adapters}; the figures are in {run.folder / METRICS}.")
    return TrainingResult(run.folder, step, 0, {}, held, None, 0, 0.0, mx.get_peak_memory() / 2**30)


def _adapters(file: str | None, folder: str) -> Path:
    return Path(folder if file is None else file).expanduser()


def _folder(adapters: Path) -> Path:
    return adapters if adapters.is_dir() else adapters.parent


def _run_settings(folder: Path) -> Mapping[str, Any]:
    settings = _table(folder / "run.json").get("settings", {})
    if not isinstance(settings, dict):
        raise ConfigError(f"{folder / 'run.json'}: settings: found {settings!r}, expected a table.")
    return settings


def _table(path: Path) -> Mapping[str, Any]:
    """A JSON file's object, empty where there is no such file."""
    return read_json_table(path, ConfigError) if path.is_file() else {}


def _precompute_reference(run: Run, reporter: Reporter, stop: StopSignals) -> None:
    """Where the adapters are the weights themselves, the reference is gone once they are loaded."""
    if run.reference is None or not run.reference.needs_precomputing:
        return
    groups = [
        [pairs[index] for index in indices]
        for pairs in held_out_pairs(run).values()
        for indices in length_order(pairs, run.config.batch_size)
    ]
    with reporter.bar("reference log-probs", sum(map(len, groups)), "pairs") as advance:

        def progress(done: int) -> None:
            advance(done)
            stop.check()

        run.reference.remember(groups, progress)


def _other_reference(run: Run, adapters: Path) -> str | None:
    """A sentence where the run that made the adapters compared with something else than the model without them."""
    start = None if run.reference is None else _run_settings(_folder(adapters)).get("resume_adapter_file")
    if start is None:
        return None
    return f"The reference here is the model without adapters; the run that made these started from {start}."
