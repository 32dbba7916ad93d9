"""Settings: flags over file over defaults, and one sentence for each thing that is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.config import TrainingConfig, make_config, read_config_file, recipe, resolve
from orpo_mlx.errors import ConfigError
from orpo_mlx.methods import METHODS, PARAMETERS


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_flags_over_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "batch_size: 2\nlearning_rate: 1e-5\nmethod: dpo\n")
    config = resolve(["-c", file, "--batch-size", "8"])
    assert (config.batch_size, config.learning_rate, config.method) == (8, 1e-5, "dpo")
    assert config.seed == TrainingConfig().seed


def test_tables_come_from_the_file_and_keep_the_other_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "lora_parameters: {rank: 4}\noptimizer_config: {adamw: {weight_decay: 0.1}}\n")
    config = resolve(["-c", file])
    assert config.lora_parameters == {"rank": 4, "dropout": 0.0, "scale": 20.0}
    assert config.optimizer_config["adamw"] == {"bias_correction": True, "weight_decay": 0.1}


_TEXTS = {"columns": "prompt=text", "report_to": "wandb,tensorboard"}
_ALONE = ("epochs", "method", "reference", "report_every", *PARAMETERS)


def test_every_flag_sets_its_field() -> None:
    argv: list[str] = []
    expected: dict[str, Any] = {}
    values: dict[type, Any] = {int: 1, float: 0.5, str: "text"}
    for field in dataclasses.fields(TrainingConfig):
        kind, choices = field.metadata["kind"], field.metadata.get("choices")
        flag = f"--{field.name.replace('_', '-')}"
        # Flags that are tried one by one below: they contradict others.
        if kind is dict or field.metadata["group"] in ("memory", "resume") or field.name in _ALONE:
            continue
        if kind is bool:
            argv.append(f"--no-{flag[2:]}" if field.default else flag)
            expected[field.name] = not field.default
            continue
        value = choices[-1] if choices else _TEXTS.get(field.name, values[kind])
        argv += [flag, str(value)]
        expected[field.name] = value
    config = resolve([*argv, "--method", "dpo"])
    assert {name: getattr(config, name) for name in expected} == expected


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
    ("argv", "expected"),
    [
        (["--learning-rate", "-1e-4"], "--learning-rate: found '-1e-4', expected a number greater than 0"),
        (["--learning-rate", "fast"], "--learning-rate: found 'fast'"),
        (["--learning-rate", "nan"], "--learning-rate: found 'nan'"),
        (["--batch-size", "0"], "--batch-size: found '0', expected a whole number greater than 0"),
        (["--batch-size", "2.5"], "--batch-size: found '2.5'"),
        (["--num-layers", "-2"], "--num-layers: found '-2', expected a whole number -1 (all) or greater than 0"),
        (["--method", "orop"], "--method orop: no method 'orop'"),
        (["--method", "sft", "--beta", "1"], "--beta: method sft has no such parameter"),
        (
            ["--report-to", "wandb,tensorbord"],
            "--report-to wandb,tensorbord: found 'tensorbord', expected one of wandb, ",
        ),
        (["--report-to", "tensorbord"], "did you mean tensorboard?"),
        (["--report-to", ""], "found '', expected one of wandb, swanlab, tensorboard."),
        (["--project-name", "p"], "--project-name: is a project of --report-to wandb or swanlab; add that"),
        (["--project-name", "p", "--report-to", "tensorboard"], "--project-name: is a project of"),
        (["--sample-every", "0"], "--sample-every: found '0', expected a whole number greater than 0"),
        (["--sample-every", "5", "--samples", "0"], "--sample-every: --samples 0 leaves no prompt to answer"),
        (["--iters", "5", "--epochs", "1"], "--iters and --epochs both say how long to train"),
        (["-c", "nowhere.yaml"], "--config nowhere.yaml: cannot be read"),
    ],
)
def test_a_bad_flag(argv: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(argv)
    assert expected in str(caught.value)


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_every_loss_parameter_has_its_flag(parameter: str) -> None:
    method = next(name for name, method in METHODS.items() if parameter in method.defaults)
    config = resolve(["--method", method, f"--{parameter.replace('_', '-')}", "0.25"])
    assert recipe(config).parameters[method][parameter] == 0.25


def test_list_methods_prints_and_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        resolve(["--list-methods"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"{name}\n" in out for name in METHODS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rte: 1e-5", "unknown key 'learning_rte'; did you mean learning_rate?"),
        ("batch_size: true", "batch_size: found True, expected a whole number"),
        ("batch_size: many", "batch_size: found 'many'"),
        ("shuffle: 1", "shuffle: found 1, expected true or false"),
        ("model: 7", "model: found 7, expected text"),
        ("lora_parameters: 8", "lora_parameters: found 8, expected a table"),
        ("- a\n- b", "found a list, expected a table of settings"),
        ("", "found nothing, expected a table of settings"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_a_bad_file_names_the_file_and_key(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_config_file(Path(file))
    assert file in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lora_parameters": {"alpha": 16}}, "lora_parameters.alpha: unknown key.*scale"),
        ({"lora_parameters": {"rank": 0}}, "lora_parameters.rank: found 0"),
        ({"lora_parameters": {"dropout": 1.0}}, "lora_parameters.dropout: found 1.0"),
        (
            {"lora_parameters": {"keys": "q_proj"}},
            "lora_parameters.keys: found 'q_proj', expected a list of module names",
        ),
        ({"lora_parameters": {"keys": []}}, r"lora_parameters.keys: found \[\]"),
        ({"lora_parameters": {7: 1}}, "lora_parameters.7: unknown key"),
        ({"optimizer_config": {"adamw": 5}}, "optimizer_config.adamw: found 5, expected a table"),
        ({"optimizer_config": {"adamx": {}}}, "optimizer_config.adamx: unknown key"),
    ],
)
def test_a_bad_table(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_config(values)


def test_an_unknown_flag_is_one_sentence_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        resolve(["--metod", "orpo"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
