"""What `orpo-mlx iterate` is told, in one YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from orpo_mlx.config.checks import check_settings, make_config, parse_number
from orpo_mlx.config.flags import naming_keys
from orpo_mlx.config.settings import SETTINGS, TrainingConfig, settings_with
from orpo_mlx.config.traits import Trait
from orpo_mlx.config.yaml_table import read_yaml_table
from orpo_mlx.data.pairs import parse_columns
from orpo_mlx.errors import ConfigError, did_you_mean
from orpo_mlx.judging.judges.judges import JudgeOptions, make_judge
from orpo_mlx.judging.judges.verdicts import Judge
from orpo_mlx.judging.requests import ROWS, Sampling
from orpo_mlx.text import quoted

TRAIN = "train"
"""The key of the table of training settings."""


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
    """The settings of all rounds; `train` holds those of each round's training."""

    data: str
    """Folder of splits, file, or Hub id: rows need a prompt and nothing else."""
    judge: str
    """As `--judge` of `orpo-mlx pairs`."""
    columns: str | None = None
    rounds: int = 3
    """At most."""
    least_gain: float = 0.01
    """The rounds end once the win rate over the base has risen by less than this over the best so far."""
    prompts: int | None = None
    """Of the train split, spread evenly; None: all."""
    samples: int = 8
    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    min_gap: float = 0.0
    rows: int = ROWS
    """Replies that are generated together."""
    seed: int = 0
    evaluation_prompts: int | None = 100
    """Of the test split (of valid, of train, where there is none); null: all."""
    judge_tokens: int = JudgeOptions().max_tokens
    judge_timeout: float = JudgeOptions().timeout_s
    judge_model: str = JudgeOptions().model
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def training(self) -> TrainingConfig:
        """The settings of a training, but for what each round sets."""
        return make_config({**self.train, "seed": self.train.get("seed", self.seed)})

    @property
    def evaluation(self) -> Sampling:
        """How replies are drawn that are compared: greedily."""
        return Sampling(self.max_tokens, seed=self.seed, template_strings=self.training.template_strings)

    def sampling(self, number: int) -> Sampling:
        """How the samples of a round, from 1, are drawn: each round draws others."""
        # In steps of 1000, so that a round of one seed is not the next round of the seed before.
        seed = self.seed * 1000 + number
        return Sampling(self.max_tokens, self.temperature, self.top_p, seed, self.training.template_strings)

    def make_judge(self) -> Judge:
        """The judge of pairs and evaluations; ConfigError where there is none of that name."""
        config = self.training
        return make_judge(
            self.judge,
            JudgeOptions(
                self.judge_tokens,
                self.judge_timeout,
                self.judge_model,
                config.dtype,
                config.trust_remote_code,
                config.template_strings,
            ),
        )


TRAINING_KEYS = {name: f"{TRAIN}.{name}" for name in SETTINGS}
"""Settings of a training, and what they are called in the file."""
KEYS = {**TRAINING_KEYS, **{field.name: field.name for field in dataclasses.fields(RoundsConfig)}}
"""All that a message may mention: what the rounds have themselves comes before what their trainings have."""


def read_rounds_config(path: Path) -> RoundsConfig:
    """The settings in a YAML file, checked.

    Raises:
        ConfigError: it cannot be read, or holds an unknown key or a wrong value; names file and key.
    """
    return rounds_config(read_yaml_table(path, str(path)), str(path))


def rounds_config(table: Mapping[str, Any], location: str) -> RoundsConfig:
    """The settings in a table, checked; ConfigError names `location` and the key."""
    fields = {field.name: field for field in dataclasses.fields(RoundsConfig)}
    for key in table:
        if key not in fields:
            hint = did_you_mean(key, fields, _expected(fields))
            # A list of training's keys would be long; one that is in it belongs there.
            hint = f"; give {TRAIN}: {{{key}: ...}}." if key in SETTINGS else hint
            raise ConfigError(f"{location}: unknown key {key!r}{hint}")
    missing = [name for name in ("data", "judge") if not isinstance(table.get(name), str)]
    if missing:
        raise ConfigError(f"{location}: {missing[0]} is not given as text; expected {missing[0]}: ...")
    hints = get_type_hints(RoundsConfig)
    values = {key: _typed(value, hints[key], f"{location}: {key}") for key, value in table.items() if key != TRAIN}
    train = table.get(TRAIN) or {}
    if not isinstance(train, dict):
        raise ConfigError(f"{location}: {TRAIN} is not a table of training settings.")
    for key in settings_with(Trait.OF_ROUNDS):
        if key in train:
            raise ConfigError(f"{location}: {TRAIN}.{key}: is set by the rounds themselves; leave it out.")
    config = RoundsConfig(**values, train=check_settings(train, f"{location}: {TRAIN}"))
    _check(config, location)
    return config


def _expected(names: Mapping[str, Any]) -> str:
    return f"; expected {', '.join(names)}."


def _typed(value: Any, hint: Any, name: str) -> Any:
    kinds = getattr(hint, "__args__", (hint,))
    if value is None and type(None) in kinds:
        return None
    if str in kinds:
        if not isinstance(value, str):
            raise ConfigError(f"{name}: found {quoted(value)}, expected text.")
        return value
    # YAML reads 1e3 as a float, and it is a whole number all the same.
    whole = isinstance(value, float) and value.is_integer()
    return parse_number(int(value) if whole else value, int if int in kinds else float, None, name)


def _check(config: RoundsConfig, location: str) -> None:
    """Refuse values out of range, before anything is loaded."""
    counts = ("rounds", "max_tokens", "rows", "prompts", "evaluation_prompts", "judge_tokens")
    for name, bound in (dict.fromkeys(counts, 1) | {"samples": 2, "seed": 0}).items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ConfigError(f"{location}: {name}: found {value}, expected {bound} or more.")
    for name in ("temperature", "judge_timeout"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ConfigError(f"{location}: {name}: found {getattr(config, name)}, expected a number above 0.")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"{location}: top_p: found {config.top_p}, expected a number above 0 and at most 1.")
    if not (config.min_gap >= 0 and -1 <= config.least_gain <= 1):
        raise ConfigError(f"{location}: min_gap must be 0 or more, and least_gain between -1 and 1.")
    # For their errors alone.
    with naming_keys(location, TRAINING_KEYS):
        _ = config.training
    with naming_keys(location, KEYS):
        parse_columns(config.columns)
        config.make_judge()
