"""Values of settings, and what they say of each other."""

from __future__ import annotations

import re
from typing import Any

import pytest

from orpo_mlx.config.checks import check_settings, make_config
from orpo_mlx.config.command_line import resolve
from orpo_mlx.errors import ConfigError


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        ([], "memory", "auto"),
        (["--memory", "plain"], "memory", "plain"),
        (["--grad-checkpoint"], "memory", "thrift"),
        (["--grad-checkpoint", "--memory", "thrift"], "memory", "thrift"),
        (["--grad-checkpoint", "--segment-layers", "3"], "segment_layers", 3),
        (["--memory", "fast", "--plain-head"], "plain_head", True),
        (["--memory", "thrift", "--no-share-prompt"], "share_prompt", False),
    ],
)
def test_memory_flags(argv: list[str], name: str, value: Any) -> None:
    assert getattr(resolve(argv), name) == value


def test_numbers_that_yaml_has_as_text_are_numbers() -> None:
    table = {
        "lora_parameters": {"rank": "16", "scale": "2e1", "dropout": "0.1"},
        "optimizer_config": {"adamw": {"weight_decay": "1e-2", "betas": ["0.9", 0.95]}, "muon": {"ns_steps": "5"}},
    }
    found = make_config(table)
    assert found.lora_parameters == {"rank": 16, "scale": 20.0, "dropout": 0.1}
    assert found.optimizer_config["adamw"] == {"bias_correction": True, "weight_decay": 0.01, "betas": [0.9, 0.95]}
    assert repr(found.optimizer_config["muon"]["ns_steps"]) == "5"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--grad-checkpoint", "--memory", "fast"], "--grad-checkpoint means --memory thrift"),
        (["--segment-layers", "2"], "--segment-layers: --memory auto runs no segments"),
        (["--segment-layers", "2", "--memory", "fast"], "--segment-layers: --memory fast runs no segments"),
        (["--plain-head", "--memory", "thrift"], "--plain-head: --memory thrift needs the head"),
        (["--plain-head", "--memory", "plain"], "--memory plain sets"),
        (["--no-share-prompt", "--memory", "plain"], "--memory plain sets"),
        (["--memory", "thirft"], "did you mean thrift"),
    ],
)
def test_memory_flags_that_contradict_each_other(argv: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        resolve(argv)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lora_parameters": {"alpha": 16}}, "lora_parameters.alpha: unknown key.*scale"),
        ({"lora_parameters": {"rank": 0}}, "lora_parameters.rank: found 0"),
        ({"lora_parameters": {"rank": 2**31}}, r"lora_parameters.rank: found 2147483648, expected .* to 2\^31 - 1\."),
        (
            {"optimizer_config": {"adamw": {"eps": "much"}}},
            "optimizer_config.adamw.eps: found .much.",
        ),
        ({"lora_parameters": {"dropout": 1.0}}, "lora_parameters.dropout: found 1.0"),
        (
            {"lora_parameters": {"keys": "q_proj"}},
            "lora_parameters.keys: found 'q_proj', expected a list of module names",
        ),
        ({"lora_parameters": {"keys": []}}, r"lora_parameters.keys: found \[\]"),
        ({"lora_parameters": {7: 1}}, "lora_parameters.7: unknown key"),
        (
            {"lr_schedule": {"name": "cosine_decay", "warmup_steps": 3}},
            "lr_schedule.warmup_steps: unknown key, expected",
        ),
        (
            {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 100, -1e-6]}},
            "lr_schedule.arguments: found -1e-06, expected a number of 0 or more",
        ),
        ({"lr_schedule": {"name": "x", "arguments": [float("nan")]}}, "lr_schedule.arguments: found nan"),
        ({"lr_schedule": {"name": "x", "arguments": [16**5000]}}, "found a number of thousands of digits"),
        ({"lr_schedule": {"name": "x", "warmup_init": float("inf")}}, "lr_schedule.warmup_init: found inf"),
        (
            {"optimizer_config": {"sgd": {"beta": 1}}},
            "optimizer_config.sgd.beta: unknown key, expected one of dampening, momentum, nesterov, weight_decay.$",
        ),
        ({"optimizer_config": {"adamw": {"lr": 1}}}, "bias_correction, eps, weight_decay .learning_rate stands outsi"),
        ({"optimizer_config": {"adamw": 5}}, "optimizer_config.adamw: found 5, expected a table"),
        ({"optimizer_config": {"adamx": {}}}, "optimizer_config.adamx: unknown key"),
    ],
)
def test_a_bad_table(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_config(values)


@pytest.mark.parametrize(
    ("value", "size"),
    [(0, 0), ("0", 0), (1_000, 1_000), ("4GB", 4 * 10**9), ("1.5G", 1_500_000_000), ("500 mb", 500 * 10**6)],
)
def test_a_size_is_read_as_mlx_lm_reads_it(value: Any, size: int) -> None:
    assert check_settings({"clear_cache_threshold": value}, "file") == {"clear_cache_threshold": size}


@pytest.mark.parametrize("value", ["much", "4TB", "", "GB", "-4GB", "1.2.3", -1, 1.5, True])
def test_a_size_that_is_none(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"file: clear_cache_threshold: found .*, expected"):
        check_settings({"clear_cache_threshold": value}, "file")


@pytest.mark.parametrize("value", ["a\0b", "a\ud800b"])
def test_a_text_that_no_file_can_be_called(value: str) -> None:
    for key in ("adapter_path", "model", "optimizer"):
        with pytest.raises(ConfigError, match=rf"^file: {key}: found '.*', expected text in UTF-8 without NUL"):
            check_settings({key: value}, "file")


def test_an_optimiser_in_capitals_is_the_same_as_in_mlx_lm() -> None:
    assert check_settings({"optimizer": "AdamW"}, "file") == {"optimizer": "adamw"}
    with pytest.raises(ConfigError, match=r"file: optimizer: found 'AdamX', expected one of .*; did you mean adam"):
        check_settings({"optimizer": "AdamX"}, "file")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("lora_layers", "num_layers"),
        ("train_mode", "method"),
        ("use_dora", "fine_tune_type"),
        ("iter", "iters"),
        ("learning_rte", "learning_rate"),
        ("max_length", "max_seq_length"),
        ("gradient_accumulation_steps", "grad_accumulation_steps"),
        ("pairs", "pair_ratings"),
        ("lr", "learning_rate"),
        ("num_epochs", "epochs"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"^file: unknown key '{key}'; did you mean {near}\?$"):
        check_settings({key: 1}, "file")


@pytest.mark.parametrize(
    ("table", "advice"),
    [
        ({"lora_rank": 16}, "lora_parameters: {rank: ...}"),
        ({"target_modules": ["q_proj"]}, "lora_parameters: {keys: ...}"),
        ({"lora_alpha": 16}, "lora_parameters: {scale: 2}, which is alpha divided by rank (16 / 8)"),
        ({"lora_alpha": 16, "r": 32}, "lora_parameters: {scale: 0.5}, which is alpha divided by rank (16 / 32)"),
        ({"lora_alpha": 8, "lora_parameters": {"rank": 4}}, "{scale: 2}, which is alpha divided by rank (8 / 4)"),
        ({"lora_alpha": "x"}, "lora_parameters: {scale: ...}, which is alpha divided by rank"),
        ({"warmup_steps": 3}, "lr_schedule: {warmup: ...}"),
        ({"weight_decay": 0.1}, "optimizer_config: {adamw: {weight_decay: ...}}"),
        ({"momentum": 0.1, "optimizer": "SGD"}, "optimizer_config: {sgd: {momentum: ...}}"),
    ],
)
def test_an_entry_of_a_table_is_refused_with_its_place(table: dict[str, Any], advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings(table, "file")
    assert re.fullmatch(rf"file: unknown key '\w+'; give .*{re.escape(advice)}\.", str(caught.value))


@pytest.mark.parametrize(
    ("other", "name"),
    [({"resume": True}, "resume"), ({"overwrite": True}, "overwrite"), ({"push_to_hub": "a/b"}, "push_to_hub")],
)
def test_a_test_leaves_the_run_as_it_is(other: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"`test` trains nothing and leaves the run as it is; leave out `{name}`."):
        make_config({"test": True, **other})
