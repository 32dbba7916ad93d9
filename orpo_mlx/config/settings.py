"""Every setting of a training run, declared once: its default, its flag, its help and what values it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from orpo_mlx.data.pairs import Reading, parse_columns
from orpo_mlx.data.ratings import PAIRINGS
from orpo_mlx.data.truncation import TRUNCATIONS
from orpo_mlx.engine.memory_modes import MODES
from orpo_mlx.losses.recipe import PARAMETERS, Recipe, make_recipe
from orpo_mlx.models.adapters import FINE_TUNE_TYPES
from orpo_mlx.models.loading import DEFAULT_MODEL, DTYPES
from orpo_mlx.reporting.tracking import SERVICES

OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
NLL_KINDS = ("completion", "sequence")
NONFINITE = ("stop", "skip")
DEFAULT_MAX_SKIPPED = 10
REFERENCES = ("shared", "copy")

DEFAULT_LORA = {"rank": 8, "dropout": 0.0, "scale": 20.0}
DEFAULT_OPTIMIZER_CONFIG: dict[str, dict[str, Any]] = {
    "adam": {"bias_correction": True},
    "adamw": {"bias_correction": True, "weight_decay": 0.0},
    "muon": {},
    "sgd": {},
    "adafactor": {},
}


class Check:
    """A predicate on a number and the words for it in an error."""

    def __init__(self, words: str, holds: Callable[[float], bool]) -> None:
        self.words, self.holds = words, holds


POSITIVE = Check("greater than 0", lambda value: value > 0)
NOT_NEGATIVE = Check("0 or more", lambda value: value >= 0)
_PORT = Check("from 0 to 65535", lambda value: 0 <= value <= 65535)
_ALL_OR_COUNT = Check("-1 (all) or greater than 0", lambda value: value == -1 or value > 0)
_ALL_OR_SOME = Check("-1 (all) or 0 or more", lambda value: value >= -1)


def _option(default: Any, help_text: str, kind: type, group: str, **extra: Any) -> Any:
    metadata = {"help": help_text, "kind": kind, "group": group, **extra}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: {**default}, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of one run. Names, meanings and defaults follow `mlx_lm.lora` where it has them.

    `iters` counts optimiser steps, each on `batch_size * grad_accumulation_steps` pairs.
    """

    method: str = _option("orpo", "how to learn from the pairs, or a sum such as 'sigmoid + 0.2*sft'", str, "what")
    model: str = _option(DEFAULT_MODEL, "Hub id, local folder or .gguf file", str, "what")
    data: str = _option("data", "folder of splits, file, or Hub id owner/name[:config][@revision]", str, "what")
    adapter_path: str = _option("adapters", "folder to write adapters, metrics and settings into", str, "what")
    test: bool = _option(
        False,
        "train nothing: evaluate the held-out splits with the adapters of --resume-adapter-file, or those in "
        "--adapter-path",
        bool,
        "what",
    )

    columns: str | None = _option(None, "columns under other names: prompt=question,rejected=worse", str, "data")
    min_margin: float | None = _option(
        None, "least score of chosen above rejected; pairs below are left out", float, "data", check=NOT_NEGATIVE
    )
    pair_ratings: str | None = _option(
        None, "make pairs of rows of rated completions: best and worst, or all", str, "data", choices=PAIRINGS
    )
    max_seq_length: int = _option(2048, "tokens of prompt and completion, at most", int, "data", check=POSITIVE)
    truncate: str = _option(
        "drop",
        "what becomes of longer pairs: left out, or the prompt cut (and, only then, the completions)",
        str,
        "data",
        choices=TRUNCATIONS,
    )
    skip_bad_rows: bool = _option(False, "leave out rows that cannot be used, and list them", bool, "data")

    beta: float | None = _option(None, "β of the method; default: the method's own, as for those below", float, "loss")
    label_smoothing: float | None = _option(None, "ε: share of pairs taken to be labelled wrongly", float, "loss")
    gamma: float | None = _option(None, "γ: target margin of simpo", float, "loss")
    alpha: float | None = _option(None, "α: weight of the likelihood term of cpo, rrhf, slic", float, "loss")
    delta: float | None = _option(None, "δ: margin of slic, shift of bco_pair, penalty of dpop", float, "loss")
    tau: float | None = _option(None, "τ: temperature of discopop's blend", float, "loss")
    nll: str = _option(
        "completion",
        "tokens of the NLL term: the chosen completion's, or prompt and chosen as in TRL",
        str,
        "loss",
        choices=NLL_KINDS,
    )

    iters: int | None = _option(None, "optimiser steps", int, "training", check=POSITIVE)
    epochs: float | None = _option(
        None, "passes over the train split, instead of --iters; default 1", float, "training", check=POSITIVE
    )
    batch_size: int = _option(4, "pairs per optimiser step", int, "training", check=POSITIVE)
    grad_accumulation_steps: int = _option(
        1, "multiplies --batch-size, as in mlx_lm.lora", int, "training", check=POSITIVE
    )
    micro_batch_tokens: int = _option(
        1024, "padded tokens run at one time; bounds memory, changes no number", int, "training", check=POSITIVE
    )
    learning_rate: float = _option(1e-4, "learning rate", float, "training", check=POSITIVE)
    lr_schedule: dict[str, Any] | None = _option(None, "mlx-lm's schedule: name, arguments, warmup", dict, "training")
    optimizer: str = _option("adamw", "optimiser", str, "training", choices=OPTIMIZERS, lower=True)
    optimizer_config: dict[str, Any] = _option(
        DEFAULT_OPTIMIZER_CONFIG, "arguments of each optimiser", dict, "training"
    )
    max_grad_norm: float | None = _option(
        None, "scale gradients down to this norm; default: as they are", float, "training", check=POSITIVE
    )
    on_nonfinite: str = _option(
        "stop",
        "what a NaN or infinity in a step does: end the run, or pass the step over and count it",
        str,
        "training",
        choices=NONFINITE,
    )
    max_skipped: int | None = _option(
        None,
        "steps passed over before the run ends, with --on-nonfinite skip; default 10",
        int,
        "training",
        check=NOT_NEGATIVE,
    )
    precompute_reference: bool = _option(
        False, "compute the reference log-probs of all pairs before the first step", bool, "training"
    )
    reference: str = _option(
        "shared",
        "reference model, where one is needed: the policy's own weights as they were, or a second copy of them, run "
        "at every step, for comparison",
        str,
        "training",
        choices=REFERENCES,
    )
    shuffle: bool = _option(True, "train in file order", bool, "training")
    seed: int = _option(0, "seed of adapters, order and dropout", int, "training", check=NOT_NEGATIVE)

    fine_tune_type: str = _option("lora", "what is trained", str, "adapters", choices=FINE_TUNE_TYPES)
    num_layers: int = _option(-1, "blocks to train, from the last; -1: all", int, "adapters", check=_ALL_OR_COUNT)
    lora_parameters: dict[str, Any] = _option(DEFAULT_LORA, "rank, scale, dropout, keys", dict, "adapters")
    resume_adapter_file: str | None = _option(
        None, "start from the weights of this adapter (mlx-lm or PEFT); --resume goes on with a run", str, "adapters"
    )
    dtype: str | None = _option(
        None,
        "weights' dtype; default: the checkpoint's, float32 on a CPU",
        str,
        "adapters",
        choices=tuple(DTYPES),
    )
    memory_check: bool = _option(True, "train without predicting the peak of memory first", bool, "adapters")
    trust_remote_code: bool = _option(False, "run Python code that comes with the checkpoint", bool, "adapters")

    memory: str = _option(
        "auto",
        "; ".join(
            [
                "auto: the fastest that is predicted to fit this machine",
                *(f"{name}: {m.help}" for name, m in MODES.items()),
            ]
        ),
        str,
        "memory",
        choices=("auto", *MODES),
    )
    segment_layers: int | None = _option(
        None,
        "layers run and freed together with --memory thrift or balanced; default 1",
        int,
        "memory",
        check=POSITIVE,
    )
    clear_cache_threshold: int | None = _option(
        None,
        "clear MLX's cache after a step that leaves more than this in it, in bytes or as 500MB, 4GB; default: as the "
        "allocator does",
        int,
        "memory",
        check=NOT_NEGATIVE,
        size=True,
    )
    grad_checkpoint: bool = _option(False, "mlx_lm.lora's name for --memory thrift", bool, "memory")
    share_prompt: bool = _option(True, "run each prompt once per completion, for comparison", bool, "memory")
    plain_head: bool = _option(False, "compute the logits of every position, for comparison", bool, "memory")

    rank_timeout: float = _option(
        300.0, "seconds to wait for the other processes of mlx.launch", float, "machines", check=POSITIVE
    )

    steps_per_report: int = _option(10, "steps between reports", int, "reports", check=POSITIVE)
    steps_per_eval: int = _option(200, "steps between validations", int, "reports", check=POSITIVE)
    val_batches: int = _option(25, "validation batches; -1: all, 0: no validation", int, "reports", check=_ALL_OR_SOME)
    test_batches: int = _option(500, "test batches; -1: all, 0: no test", int, "reports", check=_ALL_OR_SOME)
    save_every: int = _option(100, "steps between checkpoints", int, "reports", check=POSITIVE)
    keep: int = _option(3, "checkpoints that are kept, the newest ones", int, "reports", check=POSITIVE)
    save_best: bool = _option(
        False, "save and keep the checkpoint of the lowest validation loss as well; best/ leads to it", bool, "reports"
    )
    samples: int = _option(3, "sample replies before and after training", int, "reports", check=NOT_NEGATIVE)
    sample_every: int | None = _option(
        None, "steps between sample replies during training; default: before and after only", int, "reports",
        check=POSITIVE,
    )  # fmt: skip
    report_to: str | None = _option(
        None, f"services to report to, separated by commas: {', '.join(SERVICES)}", str, "reports"
    )
    project_name: str | None = _option(None, "project that --report-to files the run under", str, "reports")
    report: bool = _option(True, "write no report.html and report.png", bool, "reports")
    report_every: int | None = _option(
        None,
        "steps between writing report.html and report.png; default: at the end only",
        int,
        "reports",
        check=POSITIVE,
    )
    watch: int | None = _option(
        None,
        "serve a page that draws the run as it goes on, on this machine only, at this port; 0: any that is free",
        int,
        "reports",
        check=_PORT,
    )
    push_to_hub: str | None = _option(
        None, "owner/name: send adapters, model card and figures to this model repository at the end", str, "reports"
    )

    resume: bool = _option(
        False, "go on from the newest whole checkpoint in --adapter-path, with its settings", bool, "resume"
    )
    resume_with_changes: bool = _option(
        False, "let --resume go on where settings, data or model differ from the checkpoint's", bool, "resume"
    )
    overwrite: bool = _option(False, "start anew where --adapter-path holds an unfinished run", bool, "resume")

    def settings(self) -> dict[str, Any]:
        """All settings as a plain dictionary."""
        return dataclasses.asdict(self)


FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}
GROUPS = {
    "what": "what to train on what",
    "data": "data",
    "loss": "loss",
    "training": "training",
    "adapters": "model and adapters",
    "memory": "memory; changes no number but time and size",
    "machines": "more than one machine",
    "reports": "reports and saves",
    "resume": "going on with a run",
}


def recipe(config: TrainingConfig) -> Recipe:
    """The method of a run with its parameters.

    Raises:
        ConfigError: see `registry.resolve`.
    """
    return make_recipe(config.method, {name: getattr(config, name) for name in PARAMETERS})


def data_reading(config: TrainingConfig) -> Reading:
    """How a run's rows are read.

    Raises:
        ConfigError: see `pairs.parse_columns`.
    """
    columns = parse_columns(config.columns)
    return Reading(columns, config.pair_ratings, config.min_margin, config.skip_bad_rows)


def group_of(name: str) -> str:
    """The group a setting is declared in."""
    return str(FIELDS[name].metadata["group"])


def flag_of(name: str) -> str:
    """A setting's flag."""
    return f"--{name.replace('_', '-')}"
