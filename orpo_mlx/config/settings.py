"""Every setting of a training run, declared once, with all that any module wants to know of it.

Adding a setting is a field here: flag, help, checks, `--print-config`, resuming, comparisons and the model card follow
from it. `traits.py` says what can be declared. A run reads it as `config.NAME`; what contradicts another setting is
said in `checks.py`. Those of losses are in `loss_settings.py`, of reports and saves in `report_settings.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from orpo_mlx.config import defaults
from orpo_mlx.config.report_settings import ReportSettings
from orpo_mlx.config.traits import (
    ALL_OR_COUNT,
    GROUPS,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Setting,
    Trait,
    in_adapters,
    in_data,
    in_machines,
    in_memory,
    in_resume,
    in_training,
    in_what,
    setting_of,
)
from orpo_mlx.data.shapes.ratings import PAIRINGS
from orpo_mlx.data.tokens.trained_turns import TRAINED_TURNS
from orpo_mlx.data.tokens.truncation import TRUNCATIONS
from orpo_mlx.device_profile import device_profile
from orpo_mlx.engine.modes import MODES
from orpo_mlx.models.names import DEFAULT_MODEL, FINE_TUNE_TYPES, LOAD_DTYPES


@dataclasses.dataclass(frozen=True)
class TrainingConfig(ReportSettings):
    """Settings of one run. Names, meanings and defaults follow `mlx_lm.lora` where it has them.

    `iters` counts optimiser steps, each on `batch_size * grad_accumulation_steps` pairs.
    """

    method: str = in_what(
        "orpo",
        "how to learn from the pairs, or a sum such as 'sigmoid + 0.2*sft'",
        Trait.EVALUATED | Trait.COMPARED | Trait.NOT_ON_CARD | Trait.INSPECTED,
        any_case=True,
        aliases=("train_mode", "loss_type"),
    )
    model: str = in_what(
        DEFAULT_MODEL,
        "Hub id, local folder or .gguf file",
        Trait.EVALUATED | Trait.BY_CONTENT | Trait.NOT_ON_CARD | Trait.PUBLISHED | Trait.INSPECTED,
    )
    data: str = in_what(
        "data",
        "folder of splits, file, or Hub id owner/name[:config][@revision]",
        Trait.OF_ROUNDS | Trait.EVALUATED | Trait.BY_CONTENT | Trait.NOT_ON_CARD | Trait.PUBLISHED | Trait.INSPECTED,
    )
    adapter_path: str = in_what(
        "adapters",
        "folder to write adapters, metrics and settings into",
        Trait.OF_ROUNDS
        | Trait.RESUMABLE
        | Trait.THIS_COMMAND
        | Trait.PER_RANK
        | Trait.COMPARED
        | Trait.NOT_ON_CARD
        | Trait.TESTED,
        aliases=("output_dir",),
        also=("--output-dir",),
    )
    test: bool = in_what(
        False,
        "train nothing: evaluate the held-out splits with the adapters of --resume-adapter-file, or those in "
        "--adapter-path",
        Trait.OF_ROUNDS | Trait.THIS_COMMAND | Trait.COMPARED | Trait.TESTED,
    )
    dry_run: bool = in_what(
        False,
        "say what the run will take: steps, tokens, memory and time; a few steps are taken and not kept",
        Trait.THIS_COMMAND | Trait.COMPARED | Trait.TRAINING_ONLY | Trait.NOT_ON_CARD,
    )

    columns: str | None = in_data(
        None, "columns under other names: prompt=question,rejected=worse", Trait.OF_ROUNDS | Trait.INSPECTED
    )
    min_margin: float | None = in_data(
        None, "least score of chosen above rejected; pairs below are left out", Trait.INSPECTED, range=NOT_NEGATIVE
    )
    pair_ratings: str | None = in_data(
        None,
        "make pairs of rows of rated completions, each of them run once: best and worst, all, or neighbours in rank",
        Trait.INSPECTED,
        choices=PAIRINGS,
        also=("--pairs",),
    )
    labels: str | None = in_data(
        None, "words of the label column for a good and for a bad completion: good,bad", Trait.INSPECTED
    )
    train_on: str = in_data(
        TRAINED_TURNS[0],
        "what is learned of completions of several turns: the assistant's turns, its last one alone, or everything, "
        "turns of users and tools as well",
        Trait.INSPECTED,
        choices=TRAINED_TURNS,
    )
    max_seq_length: int = in_data(
        2048,
        "tokens of prompt and completion, at most",
        Trait.ON_CARD | Trait.PUBLISHED | Trait.INSPECTED,
        range=POSITIVE,
        aliases=("max_length",),
    )
    truncate: str = in_data(
        "drop",
        "what becomes of longer pairs: left out, cut at the completions' ends (as TRL does), or at the prompt's start",
        Trait.INSPECTED,
        choices=TRUNCATIONS,
    )
    template_strings: bool = in_data(
        True,
        "put strings into the chat template, as one turn of the user and one of the assistant",
        Trait.INSPECTED,
        off_help="take strings as they stand, as TRL does; conversations are put into the chat template in any case",
    )
    skip_bad_rows: bool = in_data(False, "leave out rows that cannot be used, and list them", Trait.INSPECTED)

    iters: int | None = in_training(
        None,
        "optimiser steps",
        Trait.RESUMABLE | Trait.COMPARED | Trait.PUBLISHED,
        range=POSITIVE,
        aliases=("max_steps", "steps"),
        replaces=("epochs",),
    )
    epochs: float | None = in_training(
        None,
        "passes over the train split, instead of --iters; default 1, or 3 of a set with fewer than 100 steps",
        Trait.RESUMABLE | Trait.COMPARED,
        range=POSITIVE,
        aliases=("num_train_epochs", "num_epochs"),
        also=("--epoch",),
        replaces=("iters",),
    )
    batch_size: int = in_training(
        4,
        "pairs per optimiser step",
        Trait.EVALUATED | Trait.ON_CARD | Trait.PUBLISHED | Trait.INSPECTED,
        range=POSITIVE,
        aliases=("per_device_train_batch_size",),
    )
    grad_accumulation_steps: int = in_training(
        1,
        "multiplies --batch-size, as in mlx_lm.lora",
        Trait.ON_CARD | Trait.PUBLISHED,
        range=POSITIVE,
        aliases=("gradient_accumulation_steps",),
    )
    micro_batch_tokens: int = in_training(
        None,
        "padded tokens run at one time; bounds memory, changes rounding alone; default: as suits the device",
        Trait.RESUMABLE | Trait.PER_RANK | Trait.PUBLISHED | Trait.INSPECTED | Trait.TESTED,
        range=POSITIVE,
    )
    learning_rate: float = in_training(
        1e-4,
        "learning rate, in the place of a file's lr_schedule",
        Trait.COMPARED | Trait.ON_CARD,
        range=POSITIVE,
        also=("--lr",),
        replaces=("lr_schedule",),
    )
    lr_schedule: dict[str, Any] | None = in_training(None, "mlx-lm's schedule: name, arguments, warmup", Trait.COMPARED)
    optimizer: str = in_training(
        "adamw",
        "optimiser",
        Trait.ON_CARD | Trait.PUBLISHED,
        choices=defaults.OPTIMIZERS,
        any_case=True,
        aliases=("optim",),
    )
    optimizer_config: dict[str, Any] = in_training(
        defaults.DEFAULT_OPTIMIZER_CONFIG, "arguments of each optimiser", Trait.NOT_ON_CARD
    )
    lora_plus_ratio: float | None = in_training(
        None, "LoRA+: learning rate of lora_b, as a multiple of lora_a's; default: the same", range=POSITIVE
    )
    patience: int | None = in_training(
        None,
        "end the run after so many validations in a row that were no better than the best; default: never",
        Trait.RESUMABLE | Trait.COMPARED,
        range=POSITIVE,
    )
    patience_on: str = in_training(
        "loss",
        "what --patience goes by: the validation loss, or the accuracy of the method's reward",
        Trait.RESUMABLE | Trait.COMPARED,
        choices=defaults.PATIENCE_ON,
    )
    max_grad_norm: float | None = in_training(
        None, "scale gradients down to this norm; default: as they are", range=POSITIVE
    )
    on_nonfinite: str = in_training(
        "stop",
        "what a NaN or infinity in a step does: end the run, or skip the step and count it",
        Trait.RESUMABLE | Trait.COMPARED,
        choices=("stop", "skip"),
    )
    max_skipped: int | None = in_training(
        None,
        f"steps skipped before the run ends, with --on-nonfinite skip; default {defaults.DEFAULT_MAX_SKIPPED}",
        Trait.RESUMABLE | Trait.COMPARED,
        range=NOT_NEGATIVE,
    )
    precompute_reference: bool = in_training(
        False, "compute the reference log-probs of all pairs before the first step", Trait.RESUMABLE | Trait.COMPARED
    )
    reference: str = in_training(
        "start",
        f"reference model, where one is needed: {defaults.REFERENCES}, or another model of the same tokenizer (as for "
        "--model), or a folder of adapters (mlx-lm or PEFT) on this one; start is what the run starts from, base the "
        "model without adapters, copy a second copy of start, run at every step, for comparison",
        Trait.COMPARED | Trait.OF_METHOD | Trait.EVALUATED | Trait.BY_CONTENT,
        former={"shared": "start"},
    )
    sync_reference: str | None = in_training(
        None,
        "TAU,STEPS: every STEPS steps the reference becomes TAU of the policy and 1 - TAU of itself (TR-DPO)",
        Trait.OF_METHOD | Trait.COMPARED,
    )
    shuffle: bool = in_training(True, "take the pairs in another order in every epoch", off_help="train in file order")
    seed: int = in_training(
        0, "seed of adapters, order and dropout", Trait.COMPARED | Trait.ON_CARD | Trait.INSPECTED, range=SEED
    )

    fine_tune_type: str = in_adapters(
        "lora",
        "what is trained",
        Trait.EVALUATED | Trait.ON_CARD | Trait.PUBLISHED,
        choices=FINE_TUNE_TYPES,
        aliases=("use_dora", "train_type"),
    )
    full_model: bool = in_adapters(
        False,
        "with --fine-tune-type full, train embeddings, final norm and head as well; it leaves them frozen otherwise",
        Trait.EVALUATED | Trait.ON_CARD | Trait.PUBLISHED,
    )
    num_layers: int = in_adapters(
        -1,
        "blocks to train, from the last; -1: all",
        Trait.EVALUATED | Trait.ON_CARD | Trait.PUBLISHED,
        range=ALL_OR_COUNT,
        aliases=("lora_layers",),
    )
    lora_parameters: dict[str, Any] = in_adapters(
        defaults.DEFAULT_LORA, "rank, scale, dropout, keys", Trait.EVALUATED | Trait.ON_CARD | Trait.PUBLISHED
    )
    resume_adapter_file: str | None = in_adapters(
        None,
        "start from the weights of this adapter (mlx-lm or PEFT); --resume goes on with a run",
        Trait.OF_ROUNDS | Trait.COMPARED | Trait.TESTED,
    )
    dtype: str | None = in_adapters(
        None,
        "weights' dtype; default: the checkpoint's, float32 on a CPU",
        Trait.EVALUATED | Trait.PUBLISHED,
        choices=LOAD_DTYPES,
    )
    memory_check: bool = in_adapters(
        True,
        "predict the peak of memory first, and stop where this machine does not hold it",
        Trait.RESUMABLE | Trait.PER_RANK | Trait.COMPARED,
        off_help="train without predicting the peak of memory first",
    )
    trust_remote_code: bool = in_adapters(
        False,
        "run Python code that comes with the checkpoint",
        Trait.RESUMABLE | Trait.THIS_COMMAND | Trait.PER_RANK | Trait.INSPECTED | Trait.TESTED,
    )

    memory: str = in_memory(
        "auto",
        "; ".join(
            [
                "auto: the fastest that is predicted to fit this machine",
                *(f"{name}: {mode.help}" for name, mode in MODES.items()),
            ]
        ),
        choices=("auto", *MODES),
        replaces=("grad_checkpoint", "segment_layers"),
    )
    segment_layers: int | None = in_memory(
        None,
        "layers run and freed together with --memory thrift or balanced; default 1",
        Trait.PUBLISHED,
        range=POSITIVE,
    )
    clear_cache_threshold: int | None = in_memory(
        None,
        "clear MLX's cache after a step that leaves more than this in it, in bytes or as 500MB, 4GB; default: as the "
        "allocator does",
        range=NOT_NEGATIVE,
        is_size=True,
    )
    grad_checkpoint: bool = in_memory(
        False, "mlx_lm.lora's name for --memory thrift", aliases=("gradient_checkpointing",), replaces=("memory",)
    )
    share_prompt: bool = in_memory(
        True,
        "run each prompt once for both completions",
        Trait.PUBLISHED,
        off_help="run each prompt once per completion, for comparison",
    )
    plain_head: bool = in_memory(False, "compute the logits of every position, for comparison", Trait.PUBLISHED)

    rank_timeout: float = in_machines(300.0, "seconds to wait for the other processes of mlx.launch", range=POSITIVE)

    resume: bool = in_resume(
        False,
        "go on from the newest whole checkpoint in --adapter-path, with its settings",
        Trait.TRAINING_ONLY | Trait.NOT_ON_CARD,
    )
    resume_with_changes: bool = in_resume(
        False, "let --resume go on where settings, data or model differ from the checkpoint's"
    )
    overwrite: bool = in_resume(
        False, "start anew where --adapter-path holds an unfinished run", Trait.TRAINING_ONLY | Trait.NOT_ON_CARD
    )

    def __post_init__(self) -> None:
        if self.micro_batch_tokens is None:
            # Resolved here rather than where it is read: the device is known, and the field is an int to every reader.
            object.__setattr__(self, "micro_batch_tokens", device_profile().micro_batch_tokens)

    def settings(self, without: Trait = Trait.NONE) -> dict[str, Any]:
        """All settings as a plain dictionary, but those with one of the traits `without`."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name, setting in SETTINGS.items() if not setting.traits & without}


_ANNOTATIONS = get_type_hints(TrainingConfig)

_FIELDS = [setting_of(field, _ANNOTATIONS[field.name]) for field in dataclasses.fields(TrainingConfig)]
SETTINGS: dict[str, Setting] = {
    setting.name: setting for group in GROUPS for setting in _FIELDS if setting.group == group
}
"""By name, in the order of `--help`."""


def settings_with(traits: Trait) -> tuple[str, ...]:
    """Names of the settings that have one of these traits."""
    return tuple(name for name, setting in SETTINGS.items() if setting.traits & traits)
