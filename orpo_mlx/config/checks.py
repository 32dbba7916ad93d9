"""Values of settings, checked one by one and against each other, whatever they come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from orpo_mlx.config.defaults import DEFAULT_LORA, DEFAULT_OPTIMIZER_CONFIG, OPTIMIZER_ARGUMENTS, OPTIMIZERS
from orpo_mlx.config.derived import data_reading, recipe
from orpo_mlx.config.reference_checks import check_reference
from orpo_mlx.config.settings import SETTINGS, TrainingConfig, settings_with
from orpo_mlx.config.traits import NOT_NEGATIVE, POSITIVE, RANK, SEED, Trait
from orpo_mlx.engine.modes import MODES
from orpo_mlx.errors import ConfigError, did_you_mean
from orpo_mlx.losses.registry import PAIR, Range
from orpo_mlx.reporting.services import check_reporting
from orpo_mlx.text import quoted

_ALIASES = {alias: setting.name for setting in SETTINGS.values() for alias in setting.aliases}
_ALIASES |= {flag[2:].replace("-", "_"): setting.name for setting in SETTINGS.values() for flag in setting.also}
_OF_LORA = {
    **dict.fromkeys(("rank", "lora_rank", "lora_r", "r"), "rank"),
    "lora_alpha": "alpha",
    **dict.fromkeys(("scale", "lora_scale"), "scale"),
    **dict.fromkeys(("dropout", "lora_dropout"), "dropout"),
    **dict.fromkeys(("keys", "lora_keys", "target_modules"), "keys"),
}
"""Entries of `lora_parameters` under the names of flags and of PEFT."""
_OF_SCHEDULE = {"lr_scheduler_type": "name", "warmup": "warmup", "warmup_steps": "warmup", "warmup_init": "warmup_init"}


_HINTS = {
    "alpha": " (mlx-lm's 'scale' is alpha divided by rank)",
    "lora_alpha": " (mlx-lm's 'scale' is alpha divided by rank)",
    "r": " (PEFT's 'r' is rank)",
    "lr": " (learning_rate stands outside of this table)",
    "learning_rate": " (learning_rate stands outside of this table)",
}
"""Where keys of tables belong that people bring from elsewhere."""


def check_settings(table: Mapping[Any, Any], location: str, also: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a table, each as its type; those that are None are left out.

    `also` are keys that an unknown one may be meant for besides.

    Raises:
        ConfigError: an unknown key or a wrong value; names `location`.
    """
    values = {}
    for key, value in table.items():
        # Refused rather than skipped: a misspelt setting would train something else than was asked for.
        if key not in SETTINGS:
            known = [*SETTINGS, *also]
            hint = _in_a_table(key, table) or did_you_mean(
                _ALIASES.get(key, key), known, "; orpo-mlx train --help has them all."
            )
            raise ConfigError(f"{location}: unknown key {quoted(key)}{hint}")
        if value is not None:
            values[key] = coerce(key, value, f"{location}: {key}")
    return values


def _in_a_table(key: Any, table: Mapping[Any, Any]) -> str:
    """How a message about an unknown key ends where it is an entry of a table; empty where it is none."""
    if key in _OF_LORA:
        entry = _OF_LORA[key]
        if entry == "alpha":
            return f"; give {_scale_of(table[key], table)}."
        return f"; give lora_parameters: {{{entry}: ...}}."
    if key in _OF_SCHEDULE:
        return f"; give lr_schedule: {{{_OF_SCHEDULE[key]}: ...}}."
    optimizer = str(table.get("optimizer", TrainingConfig.optimizer)).lower()
    if key in OPTIMIZER_ARGUMENTS.get(optimizer, ()):
        return f"; give optimizer_config: {{{optimizer}: {{{key}: ...}}}}."
    return ""


def _scale_of(alpha: Any, table: Mapping[Any, Any]) -> str:
    """The entry of `lora_parameters` that a table's alpha comes to, with its rank if it has one."""
    given = table.get("lora_parameters")
    tables = [given if isinstance(given, Mapping) else {}, table]
    ranks = [each[key] for each in tables for key, entry in _OF_LORA.items() if entry == "rank" and key in each]
    rank = ranks[0] if ranks else DEFAULT_LORA["rank"]
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) and each > 0 for each in (alpha, rank))
    if not numbers or not math.isfinite(alpha / rank):
        return "lora_parameters: {scale: ...}, which is alpha divided by rank"
    return f"lora_parameters: {{scale: {alpha / rank:g}}}, which is alpha divided by rank ({alpha:g} / {rank:g})"


def checked_config(config: TrainingConfig) -> TrainingConfig:
    """A config made in Python, as if each of its fields had come from a flag: checked, and with what follows from it.

    Raises:
        ConfigError: a value that cannot be used; names the field.
    """
    if not isinstance(config, TrainingConfig):
        raise ConfigError(f"config: found {type(config).__name__}, expected a TrainingConfig.")
    for field in dataclasses.fields(config):
        # check_settings leaves None out, as YAML's null; in Python it would quietly become the default.
        if getattr(config, field.name) is None and field.default is not None:
            raise ConfigError(f"TrainingConfig: {field.name}: found None; leave it out to have the default.")
    return make_config(check_settings(config.settings(), "TrainingConfig"))


def make_config(values: Mapping[str, Any]) -> TrainingConfig:
    """A `TrainingConfig` from checked values, with the checks that concern several of them.

    Raises:
        ConfigError: settings that contradict each other, or nested tables with unknown keys.
    """
    config = TrainingConfig(**dict(values))
    check_together(config)
    check_reference(config)
    check_schedule(config.lr_schedule or {})
    # For its errors alone: what it returns is made anew where rows are read.
    data_reading(config)
    return dataclasses.replace(
        config,
        memory=memory_mode(config),
        lora_parameters=complete_lora_parameters(config),
        optimizer_config=complete_optimizer_config(config),
    )


def check_together(config: TrainingConfig) -> None:
    """Refuse settings that contradict each other, or would do nothing; raises ConfigError."""
    if config.iters is not None and config.epochs is not None:
        raise ConfigError("`iters` and `epochs` both say how long to train; give one of them.")
    if config.report_every is not None and not config.report:
        raise ConfigError("`report=False`: `report_every` asks for reports; give one of them.")
    if config.sample_every is not None and config.samples == 0:
        raise ConfigError("`sample_every`: `samples=0` leaves no prompt to answer; give `samples=1` or more.")
    if (config.evaluate_every is None) != (config.judge is None):
        raise ConfigError("`evaluate_every` and `judge` say when replies are judged and by whom; give both or neither.")
    if config.evaluate_every is None and config.judge_prompts != TrainingConfig.judge_prompts:
        raise ConfigError("`judge_prompts` says how many replies `evaluate_every` judges; add that, or leave it out.")
    if config.full_model and config.fine_tune_type != "full":
        raise ConfigError("`full_model`: says what `fine_tune_type=full` trains; add that, or leave it out.")
    if config.judge is not None and config.fine_tune_type == "full":
        raise ConfigError("`fine_tune_type=full`: leaves no base to judge replies against; leave out `judge`.")
    if config.best_by == "win_rate" and (config.judge is None or not config.save_best):
        raise ConfigError("`best_by=win_rate`: needs `save_best`, `evaluate_every` and `judge`.")
    check_reporting(config.report_to, config.project_name)
    if not recipe(config).needs_reference and config.precompute_reference:
        raise ConfigError(f"`precompute_reference`: method {config.method} compares with no reference; leave it out.")
    check_unit(config)
    if config.max_skipped is not None and config.on_nonfinite != "skip":
        raise ConfigError("`max_skipped` bounds what `on_nonfinite=skip` skips; add that, or leave it out.")
    if config.patience_on != "loss" and config.patience is None:
        raise ConfigError("`patience_on` says what `patience` goes by; add that, or leave it out.")
    if config.lora_plus_ratio is not None and config.fine_tune_type == "full":
        raise ConfigError("`lora_plus_ratio` is about lora_b, and `fine_tune_type=full` has none; leave it out.")
    if config.router_aux_loss_coef > 0 and config.memory != "plain":
        raise ConfigError(
            f"`router_aux_loss_coef={config.router_aux_loss_coef:g}`: looks at every router and every token at once, "
            f"which `memory={config.memory}` never has; add `memory=plain`."
        )
    if config.resume_with_changes and not config.resume:
        raise ConfigError("`resume_with_changes` says how `resume` goes on; add that.")
    if config.dry_run and config.resume:
        raise ConfigError("`dry_run` looks at a run from its beginning; leave out `resume`.")
    if config.resume and config.overwrite:
        raise ConfigError("`resume` goes on with a run and `overwrite` starts anew; give one of them.")
    for name in settings_with(Trait.TRAINING_ONLY):
        if config.test and getattr(config, name) not in (None, False):
            raise ConfigError(f"`test` trains nothing and leaves the run as it is; leave out `{name}`.")


def check_unit(config: TrainingConfig) -> None:
    """Refuse settings for pairs where the method's losses are of completions or lists; raises ConfigError."""
    method = recipe(config)
    if method.unit == PAIR:
        return
    if config.nll != "completion":
        raise ConfigError(f"`nll={config.nll}`: method {config.method} is no loss of a pair; leave it out.")
    if config.pair_ratings not in (None, "best_worst"):
        raise ConfigError(
            f"`pair_ratings={config.pair_ratings}` makes pairs, and method {config.method} is a loss of a "
            f"{method.unit}; leave it out, or take `pair_ratings=best_worst`."
        )
    if method.wanted.kl and config.batch_size * config.grad_accumulation_steps == 1:
        raise ConfigError(
            f"`batch_size=1`: method {config.method} measures rewards from other prompts' completions of the same "
            "step; give `batch_size=2` or more."
        )


def check_schedule(schedule: Mapping[str, Any]) -> None:
    """Refuse keys that are no schedule's, and numbers that no learning rate can come of; raises ConfigError."""
    # mlx-lm leaves out what it does not know: a misspelt `warmup` would be none.
    check_keys("lr_schedule", schedule, {"name", "arguments", "warmup", "warmup_init"})
    for key in ("arguments", "warmup", "warmup_init"):
        value = schedule.get(key)
        # What is no number at all is refused where the schedule is made, which knows what each argument is.
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not (_is_finite(number) and number >= 0):
                raise ConfigError(
                    f"lr_schedule.{key}: found {quoted(number)}, expected a number of 0 or more: a negative rate would "
                    "move away from the goal."
                )
    # `warmup: 0` says that there is none, whatever else stands there.
    if "warmup_init" in schedule and "warmup" not in schedule:
        raise ConfigError("lr_schedule.warmup_init: is where warmup begins, and there is none; add warmup: STEPS.")


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # A whole number that no float holds.
        return False


def complete_lora_parameters(config: TrainingConfig) -> dict[str, Any]:
    """The table with its defaults; raises ConfigError for a key or a value that mlx-lm would not take."""
    lora = {**DEFAULT_LORA, **config.lora_parameters}
    check_keys("lora_parameters", lora, {"rank", "scale", "dropout", "keys"})
    for key, allowed in (("rank", RANK), ("scale", POSITIVE), ("dropout", NOT_NEGATIVE)):
        lora[key] = parse_number(lora[key], int if key == "rank" else float, allowed, f"lora_parameters.{key}")
    # mlx's Dropout divides by what is left.
    if lora["dropout"] >= 1:
        raise ConfigError(f"lora_parameters.dropout: found {lora['dropout']}, expected a number below 1.")
    keys = lora.get("keys")
    if keys is not None and not (isinstance(keys, list) and keys and all(isinstance(key, str) for key in keys)):
        raise ConfigError(
            f"lora_parameters.keys: found {quoted(keys)}, expected a list of module names such as self_attn.q_proj."
        )
    for key, value in lora.items() if config.fine_tune_type == "full" else ():
        # Defaults may stand there: `--print-config` writes all of them.
        if value != DEFAULT_LORA.get(key):
            raise ConfigError(
                f"lora_parameters.{key}: `fine_tune_type=full` trains no adapters; leave out one of them."
            )
    return lora


def complete_optimizer_config(config: TrainingConfig) -> dict[str, Any]:
    """Each optimiser's arguments with their defaults; raises ConfigError for an optimiser or argument that is none."""
    check_keys("optimizer_config", config.optimizer_config, set(OPTIMIZERS))
    optimizers = {}
    for key in OPTIMIZERS:
        table = config.optimizer_config.get(key) or {}
        if not isinstance(table, dict):
            raise ConfigError(f"optimizer_config.{key}: found {quoted(table)}, expected a table.")
        # Of the other optimisers as well, whose tables do nothing: misspelt there, it would be found at the next run.
        check_keys(f"optimizer_config.{key}", table, set(OPTIMIZER_ARGUMENTS[key]))
        given = {name: _argument(value, f"optimizer_config.{key}.{name}") for name, value in table.items()}
        optimizers[key] = {**DEFAULT_OPTIMIZER_CONFIG[key], **given}
    return optimizers


def _argument(value: Any, location: str) -> Any:
    """An optimiser's argument: YAML has a number such as 1e-2 for a text; raises ConfigError for another text."""
    if isinstance(value, list):
        return [_argument(each, location) for each in value]
    if not isinstance(value, str):
        return value
    number = parse_number(value, float, None, location)
    return int(value) if value.strip().lstrip("+-").isdigit() else number


def memory_mode(config: TrainingConfig) -> str:
    """`config.memory` with `grad_checkpoint` taken into account.

    Raises:
        ConfigError: flags that contradict it, or would do nothing.
    """
    mode = config.memory
    if config.grad_checkpoint:
        if mode not in ("auto", "thrift"):
            raise ConfigError(
                f"`grad_checkpoint` means `memory=thrift`, and `memory={mode}` is given; give one of them."
            )
        mode = "thrift"
    # "auto" is in no table: whether it runs segments is known once a step's memory is predicted.
    in_segments = mode in MODES and MODES[mode].kept_layers < 1
    if config.segment_layers is not None and not in_segments:
        raise ConfigError(f"`segment_layers`: `memory={mode}` runs no segments; add `memory=thrift` or balanced.")
    if config.plain_head and in_segments:
        raise ConfigError(f"`plain_head`: `memory={mode}` needs the head apart from the layers; use `memory=fast`.")
    # Plain is what the others are compared with, so it must be one thing.
    if mode == "plain" and (config.plain_head or not config.share_prompt):
        raise ConfigError("`memory=plain` sets `share_prompt=False` and `plain_head` itself; leave them out.")
    return mode


def coerce(name: str, value: Any, location: str) -> Any:
    """`value` as the setting's type.

    Raises:
        ConfigError: it is not of that type or outside its range; names `location`.
    """
    setting = SETTINGS[name]
    if setting.is_size and isinstance(value, str):
        value = parse_size(value, location)
    if setting.kind is int or setting.kind is float:
        return parse_number(value, setting.kind, setting.range, location)
    if value == "" and setting.kind is str:
        raise ConfigError(f"{location}: is empty; give a value, or leave it out.")
    if not isinstance(value, setting.kind):
        names = {dict: "a table", bool: "true or false", str: "text"}
        raise ConfigError(f"{location}: found {quoted(value)}, expected {names[setting.kind]}.")
    if isinstance(value, str) and not _is_plain(value):
        raise ConfigError(f"{location}: found {quoted(value)}, expected text in UTF-8 without NUL; write it anew.")
    chosen: Any = str(value).lower() if setting.any_case else value
    if setting.former:
        chosen = setting.former.get(chosen, chosen)
    if setting.choices and chosen not in setting.choices:
        hint = did_you_mean(chosen, setting.choices)
        raise ConfigError(f"{location}: found {quoted(value)}, expected one of {', '.join(setting.choices)}{hint}")
    return chosen


def _is_plain(text: str) -> bool:
    """Whether a text can be part of a file's name: YAML and Python have texts that no system takes for one."""
    try:
        text.encode()
    except UnicodeEncodeError:  # Half of a surrogate pair.
        return False
    return "\0" not in text


def parse_size(value: str, location: str) -> int:
    """Bytes of a size as mlx-lm reads it: a number, alone or with M, MB, G or GB (powers of ten)."""
    # mlx-lm's own, though private, so that a size means the same in both; it takes a second to import.
    from mlx_lm.utils import _parse_size

    try:
        return int(_parse_size(value))
    except (ArithmeticError, KeyError, ValueError):
        raise ConfigError(
            f"{location}: found {quoted(value)}, expected bytes, or a size such as 500MB or 4GB."
        ) from None


def parse_number(value: Any, kind: type[int] | type[float], allowed: Range | None, location: str) -> int | float:
    """A number of a kind, also from text, within what is `allowed`; raises ConfigError."""
    wanted = ("a whole number" if kind is int else "a number") + (f" {allowed.text}" if allowed else "")
    try:
        # True is an int to Python, and `iters: true` a slip.
        if isinstance(value, bool):
            raise ValueError
        # Not int() of a float, which would cut 2.5 to 2 without a word.
        number: int | float = kind(value) if isinstance(value, str) or kind is float else value
        if not isinstance(number, kind) or not math.isfinite(number) or (allowed and not allowed.holds(number)):
            raise ValueError
        # What MLX and NumPy hold; seeds say so themselves.
        if allowed is not SEED and abs(number) >= 2**63 and kind is int:
            wanted = "a whole number below 2^63"
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{location}: found {quoted(value)}, expected {wanted}.") from None
    return number


def check_keys(name: str, table: Mapping[str, Any], known: set[str]) -> None:
    """Refuse keys of a table that are not known; raises ConfigError."""
    for key in map(str, table):
        if key not in known:
            hint = _HINTS.get(key, "")
            raise ConfigError(f"{name}.{key}: unknown key, expected one of {', '.join(sorted(known))}{hint}.")
