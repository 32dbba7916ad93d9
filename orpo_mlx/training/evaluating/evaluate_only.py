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
from orpo_mlx.errors import ConfigError, ModelError
from orpo_mlx.files import read_json_table
from orpo_mlx.models.adapters import load_adapter_file
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.metrics_log import MetricsFile
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE, CHECKPOINTS, RUN_FILE
from orpo_mlx.training.checkpoints.folders import CheckpointFolder, checkpoint_name
from orpo_mlx.training.checkpoints.progress import EvalMetrics, TrainingResult
from orpo_mlx.training.checkpoints.state import STATE_FILE, read_state
from orpo_mlx.training.data_order import evaluation_groups, evaluation_pairs, steps_taken
from orpo_mlx.training.distributed import Ranks
from orpo_mlx.training.evaluating.evaluation import evaluate_splits
from orpo_mlx.training.interrupts import StopSignals
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.references.reference_pass import compute_reference
from orpo_mlx.training.run import Run

# Not metrics.jsonl: the run that made the adapters stays as it is.
TEST_METRICS_FILE = "test_metrics.jsonl"


def settings_of_adapters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the adapters under test were made with, as far as evaluation metrics depend on them.

    They are in the `run.json` beside the adapters, of a checkpoint in its `state.json`, or, of adapters that mlx-lm
    made, in `adapter_config.json`.

    Args:
        values: the settings that were given.

    Raises:
        ConfigError: a file there holds none.
    """
    adapters = adapters_to_test(values.get("resume_adapter_file"), values.get("adapter_path"))
    folder = folder_of(adapters)
    for path, table in (
        (folder / RUN_FILE, recorded_settings(folder)),
        (folder / STATE_FILE, recorded_settings(folder, STATE_FILE)),
        (folder / ADAPTER_CONFIG_FILE, read_table(folder / ADAPTER_CONFIG_FILE)),
    ):
        if table:
            decisive = settings_with(Trait.EVALUATED)
            return check_settings({name: table[name] for name in decisive if name in table}, str(path))
    return {}


def evaluate_only(config: TrainingConfig, reporter: Reporter, ranks: Ranks) -> TrainingResult:
    """Evaluate the held-out splits with the adapters that `config` names; `test_metrics.jsonl` in
    `config.adapter_path` has the metrics.

    The reference, for methods with one, is the model without the adapters, or what `reference` names.

    Returns:
        The metrics by split, as those after the steps that made the adapters; nothing of how these were made.

    Raises:
        UserError: settings, data, model or adapters cannot be used.
    """
    if ranks.size > 1:
        raise ConfigError("`test`: evaluates on one process; leave out mlx.launch.")
    adapters = adapters_to_test(config.resume_adapter_file, config.adapter_path)
    if not adapters.exists() or (adapters.is_dir() and not any(adapters.glob("adapter*.safetensors"))):
        raise ModelError(
            f"`test`: no adapters in {adapters}; give the folder of a run with `adapter_path`, or a file with "
            "`resume_adapter_file`."
        )
    # Without the adapters at first: what the reference is.
    run = prepare(dataclasses.replace(config, resume_adapter_file=None), ranks)
    if not evaluation_pairs(run):
        raise ConfigError("`test`: `val_batches=0` and `test_batches=0` leave nothing to evaluate; raise one of them.")
    for name, split in run.splits.items():
        reporter.say(split.summary(name))
    say_other_reference(run, adapters, reporter)
    step = steps_taken(adapters)
    metrics = _evaluate_adapters(run, adapters, step, reporter)
    reporter.closing_table({}, metrics)
    reporter.say(f"\nAdapters of {adapters}; the figures are in {run.folder / TEST_METRICS_FILE}.")
    return TrainingResult(
        adapter_path=run.folder,
        steps=step,
        skipped=0,
        before={},
        after=metrics,
        best=None,
        trained_tokens=0,
        training_seconds=0.0,
        peak_memory_gib=mx.get_peak_memory() / 2**30,
    )


def _evaluate_adapters(run: Run, adapters: Path, step: int, reporter: Reporter) -> EvalMetrics:
    """Load the adapters, once the reference needs the weights no longer, and evaluate."""
    try:
        with StopSignals() as stop:
            if run.reference is not None and run.reference.needs_precomputing:
                # Where the adapters are the weights themselves, the reference is gone once they are loaded.
                compute_reference(run, run.reference, evaluation_groups(run), reporter, stop)
            load_adapter_file(run.loaded.model, adapters, run.config.lora_parameters["scale"])
            restore_rewards(run, adapters, step, reporter)
            with closing(MetricsFile(run.folder / TEST_METRICS_FILE)) as metrics_file:
                metrics = evaluate_splits(
                    run,
                    ("valid", "test"),
                    step=step,
                    untrained=False,
                    reporter=reporter,
                    metrics_file=metrics_file,
                    stop=stop,
                )
        stop.check(f"the figures are in {run.folder / TEST_METRICS_FILE}")
        return metrics
    finally:
        if run.reference is not None:
            run.reference.table.save()


def say_other_reference(run: Run, adapters: Path, reporter: Reporter) -> None:
    """Say where the run that made the adapters compared with something else than the model without them."""
    recorded = {} if run.reference is None else recorded_settings(folder_of(adapters))
    start = recorded.get("resume_adapter_file")
    if start is not None and run.config.reference == "start":
        reporter.say(f"The reference here is the model without adapters; the run that made these started from {start}.")
    if recorded.get("sync_reference") is not None:
        reporter.say("The reference here is that of the run's first step; in the run that made these it has moved.")


def adapters_to_test(file: str | None, folder: str | None) -> Path:
    """The file of `--resume-adapter-file`, or the folder of `--adapter-path`."""
    if file is not None:
        return Path(file).expanduser()
    return Path(TrainingConfig.adapter_path if folder is None else folder).expanduser()


def folder_of(adapters: Path) -> Path:
    """The folder that adapters are, or lie in."""
    return adapters if adapters.is_dir() else adapters.parent


def recorded_settings(folder: Path, name: str = RUN_FILE) -> Mapping[str, Any]:
    """The settings in a folder's file, none where there is no such file; ConfigError where they are no table."""
    settings = read_table(folder / name).get("settings", {})
    if not isinstance(settings, dict):
        raise ConfigError(f"{folder / name}: settings: found {settings!r}, expected a table.")
    return settings


def restore_rewards(run: Run, adapters: Path, step: int, reporter: Reporter) -> None:
    """Set the mean of rewards that a method measures from to what the training of the adapters made it."""
    if not run.method.wanted.running:
        return
    folder = folder_of(adapters)
    for path in (folder, folder / CHECKPOINTS / checkpoint_name(step)):
        if (path / STATE_FILE).is_file():
            run.rewards = read_state(CheckpointFolder(path, step)).rewards
            return
    reporter.say("Rewards are measured from 0 here: the checkpoint that knows their mean in training is not there.")


def read_table(path: Path) -> Mapping[str, Any]:
    """A JSON file's object, empty where there is no such file."""
    return read_json_table(path, ConfigError) if path.is_file() else {}
