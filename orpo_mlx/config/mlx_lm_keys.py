"""Keys of an `mlx_lm.lora` config file that are no settings here: what each means, or why it cannot be taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.errors import ConfigError
from orpo_mlx.text import quoted

KEYS = ("train", "mask_prompt", "training_mode", "config", "hf_dataset")


def without_mlx_lm_keys(table: Mapping[Any, Any], flags: Mapping[str, Any], location: str) -> dict[Any, Any]:
    """The settings among an `mlx_lm.lora` file's keys, with what its other keys mean in them.

    `train: true` trains, whatever `test` says, since the held-out splits are always evaluated; `train: false` with
    `test: true` evaluates only. `mask_prompt` must agree with `nll`, `training_mode` with `method`; `config` must be
    null.

    Args:
        table: the file's.
        flags: settings of the command line, which come first.
        location: the file, for errors.

    Raises:
        ConfigError: a key asks for what is not done here; says what to write instead.
    """
    rest = {key: value for key, value in table.items() if key not in KEYS}
    given = {key: table[key] for key in KEYS if table.get(key) is not None}
    settings = {**rest, **flags}
    for key in ("train", "mask_prompt"):
        if not isinstance(given.get(key, True), bool):
            raise ConfigError(f"{location}: {key}: found {quoted(given[key])}, expected true or false.")
    if "train" in given:
        rest.update(meaning_of_train(given["train"], settings, location))
    if "mask_prompt" in given:
        check_masking(given["mask_prompt"], settings, location)
    if given.get("training_mode", "normal") not in ("normal", settings.get("method", TrainingConfig.method)):
        raise ConfigError(
            f"{location}: training_mode: found {quoted(given['training_mode'])}; method says how to learn here, give "
            "it that value and leave out training_mode."
        )
    if "config" in given:
        raise ConfigError(f"{location}: config: a config file cannot name another; put the settings into one.")
    if "hf_dataset" in given:
        raise ConfigError(f"{location}: hf_dataset: give data: owner/name, and columns where they have other names.")
    return rest


def meaning_of_train(train: bool, settings: Mapping[str, Any], location: str) -> dict[str, Any]:
    """What mlx-lm's switch for training says of `test`; raises ConfigError where it leaves nothing to do."""
    # mlx-lm trains, then tests, where both are true; the held-out splits are evaluated here in any case.
    if train:
        return {"test": False}
    if settings.get("test") is not True:
        raise ConfigError(f"{location}: train: false without test: true leaves nothing to do; set one of them to true.")
    return {}


def check_masking(masked: bool, settings: Mapping[str, Any], location: str) -> None:
    """Refuse a mask that contradicts `nll`; raises ConfigError."""
    nll = settings.get("nll") or TrainingConfig.nll
    if masked != (nll == "completion"):
        other = "sequence" if nll == "completion" else "completion"
        raise ConfigError(
            f"{location}: mask_prompt: {str(masked).lower()} contradicts nll: {nll}, by which the prompt is "
            f"{'not ' if nll == 'completion' else ''}trained on; leave it out, or set nll: {other}."
        )
