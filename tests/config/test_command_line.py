"""Flags over file over an earlier run over defaults, and one sentence for each thing that is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from orpo_mlx.cli.train import given_alone
from orpo_mlx.config.command_line import given_settings, merge_settings, read_config_file, resolve
from orpo_mlx.config.defaults import DEFAULT_LORA
from orpo_mlx.config.derived import recipe
from orpo_mlx.config.settings import SETTINGS, TrainingConfig
from orpo_mlx.device_profile import VARIABLE, DeviceProfile, RowLayout, device_profile
from orpo_mlx.errors import ConfigError
from orpo_mlx.files import read_json_table
from orpo_mlx.losses.recipe import PARAMETERS
from orpo_mlx.losses.registry import METHODS

EMPTY: Mapping[str, Any] = MappingProxyType({})


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_flags_over_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "batch_size: 2\nlearning_rate: 1e-5\nmethod: dpo\n")
    config = resolve(["-c", file, "--batch-size", "8"])
    assert (config.batch_size, config.learning_rate, config.method) == (8, 1e-5, "dpo")
    assert config.seed == TrainingConfig().seed


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("iters: 1000", ["--epochs", "2"], {"iters": None, "epochs": 2.0}),
        ("epochs: 3", ["--iters", "5"], {"iters": 5, "epochs": None}),
        ("grad_checkpoint: true", ["--memory", "fast"], {"grad_checkpoint": False, "memory": "fast"}),
        ("memory: fast", ["--grad-checkpoint"], {"grad_checkpoint": True, "memory": "thrift"}),
        ("{memory: thrift, segment_layers: 2}", ["--memory", "fast"], {"memory": "fast", "segment_layers": None}),
        ("{memory: thrift, segment_layers: 2}", ["--segment-layers", "4"], {"memory": "thrift", "segment_layers": 4}),
        ("lr_schedule: {name: step_decay}", ["--lr", "1e-3"], {"lr_schedule": None, "learning_rate": 1e-3}),
        ("{lora_parameters: {rank: 2}, lora_plus_ratio: 4}", ["--fine-tune-type", "full"], {"lora_plus_ratio": None}),
        ("{shuffle: false, save_best: true}", ["--shuffle", "--no-save-best"], {"shuffle": True, "save_best": False}),
    ],
)
def test_a_flag_wins_over_what_the_file_says_under_another_name(
    tmp_path: Path, text: str, argv: list[str], expected: dict[str, Any]
) -> None:
    config = resolve(["-c", write(tmp_path, text), *argv])
    assert {name: getattr(config, name) for name in expected} == expected


def test_flags_that_people_bring_are_taken(tmp_path: Path) -> None:
    words = "--output-dir out --epoch 2 --lr 1e-3 --batch_size 8 --skip_bad_rows --method ORPO"
    config = resolve(words.split())
    assert (config.adapter_path, config.epochs, config.learning_rate) == ("out", 2.0, 1e-3)
    assert (config.batch_size, config.skip_bad_rows, config.method) == (8, True, "orpo")


def test_entries_of_lora_parameters_have_flags_over_the_file_over_an_earlier_run(tmp_path: Path) -> None:
    file = write(tmp_path, "lora_parameters: {rank: 16, scale: 2.0}\n")
    given = given_settings(["-c", file, "--lora-alpha", "8", "--lora-keys", "self_attn.q_proj,self_attn.k_proj"])
    lora = merge_settings(given, {"lora_parameters": {"rank": 4, "scale": 5.0, "dropout": 0.1}}).lora_parameters
    assert lora == {"rank": 16, "scale": 0.5, "dropout": 0.1, "keys": ["self_attn.q_proj", "self_attn.k_proj"]}
    assert resolve(["--lora-rank", "4"]).lora_parameters == {"rank": 4, "scale": 20.0, "dropout": 0.0}
    for words, expected in {
        "--lora-rank x": "--lora-rank: found 'x', expected a whole number.",
        "--lora-rank 0": "lora_parameters.rank: found 0",
        "--lora-alpha nan": "--lora-alpha: found 'nan', expected a number.",
        "--lora-dropout 1": "lora_parameters.dropout: found 1.0, expected a number below 1.",
    }.items():
        with pytest.raises(ConfigError) as caught:
            resolve(words.split())
        assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--learning_rat 1", "unrecognized arguments: --learning_rat 1; did you mean --learning-rate? See "),
        ("--gradient-accumulation 3", "did you mean --grad-accumulation-steps? See "),
        ("--num-train-epochs 3", "did you mean --epochs? See "),
        ("--zzz", "unrecognized arguments: --zzz; see "),
        ("--adapter-path=", "--adapter-path: is empty; give a value, or leave it out; see "),
        (f"--{'x' * 100_000}", "unrecognized arguments: --xxx"),
    ],
)
def test_a_flag_that_is_none_is_one_sentence_with_what_was_meant(
    words: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        resolve(words.split())
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
    assert len(err) <= 400


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("iters: 3\nepochs: 2", "", "{file}: iters and epochs both say how long to train"),
        ("memory: fast", "--segment-layers 2", "--segment-layers: memory: fast (in {file}) runs no segments; add mem"),
        ("report: false\nreport_every: 3", "", "{file}: report: false: report_every asks for reports; give one of"),
        ("lora_parameters: {rank: 0}", "", "{file}: lora_parameters.rank: found 0"),
        ("lora_parameters: {scale: 3}", "--lora-rank 0", "lora_parameters.rank: found 0"),
        (
            "fine_tune_type: full\nlora_parameters: {rank: 2}",
            "",
            "{file}: lora_parameters.rank: fine_tune_type: full tr",
        ),
        ("fine_tune_type: full", "--lora-rank 8", "--lora-rank: fine_tune_type: full (in {file}) trains no adapters"),
        ("seed: 3", "--fine-tune-type full --lora-alpha 8", "--lora-alpha: --fine-tune-type full trains no adapters"),
        ("seed: 3", "--fine-tune-type full --lora-dropout 0", "--lora-dropout: --fine-tune-type full trains no ad"),
        ("seed: 3", "--fine-tune-type full --lora-keys a", "--lora-keys: --fine-tune-type full trains no adapters"),
        ("samples: 0", "--sample-tokens 9", "--sample-tokens: samples: 0 (in {file}) and no --judge leave no reply"),
        ("val_batches: 0", "--steps-per-eval 9", "--steps-per-eval: val_batches: 0 (in {file}) leaves nothing to"),
        ("lr_schedule: {name: x, warmup_init: 1e-7}", "", "{file}: lr_schedule.warmup_init: is where warmup begins"),
        ("method: orop", "", "{file}: method orop: no method 'orop'"),
        ("method: orop", "--test", "{file}: method orop: no method 'orop'"),
        ("seed: 3", "--iters 3 --epochs 2", "--iters and --epochs both say"),
    ],
)
def test_what_a_file_gave_is_called_by_file_and_key(tmp_path: Path, text: str, flags: str, expected: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        given_alone(given_settings(["-c", file, *flags.split()]))
    assert str(caught.value).startswith(expected.format(file=file))


def test_what_others_recorded_beside_full_weights_is_passed_over(tmp_path: Path) -> None:
    recorded = {"fine_tune_type": "full", "lora_parameters": {"rank": 16, "keys": ["self_attn.q_proj"]}}
    assert merge_settings(given_settings([]), recorded).lora_parameters == DEFAULT_LORA
    # What `--print-config` writes can be given back.
    file = write(tmp_path, "fine_tune_type: full\nlora_parameters: {rank: 8, scale: 20.0, dropout: 0.0, keys: null}\n")
    assert resolve(["-c", file]).fine_tune_type == "full"


def test_what_a_file_says_of_something_switched_off_for_once_is_passed_over(tmp_path: Path) -> None:
    file = write(tmp_path, "steps_per_eval: 50\nsample_tokens: 32\n")
    config = resolve(["-c", file, "--val-batches", "0", "--samples", "0"])
    assert (config.val_batches, config.steps_per_eval, config.sample_tokens) == (0, 50, 32)
    # So is what a run that goes on was begun with.
    assert merge_settings(given_settings(["--val-batches", "0"]), {"steps_per_eval": 50}).steps_per_eval == 50
    with pytest.raises(ConfigError, match=r"^--sample-tokens: --samples 0 and no --judge leave no reply to bound"):
        resolve(["-c", file, "--samples", "0", "--sample-tokens", "9"])


def test_numbers_that_no_library_holds(tmp_path: Path) -> None:
    for words in ("--seed 18446744073709551616", "--seed -1", f"--iters {10**30}", f"--seed {'9' * 5000}"):
        with pytest.raises(ConfigError, match=r"expected a whole number (from 0 to|below) 2\^6"):
            resolve(words.split())
    assert resolve(["--seed", str(2**64 - 1)]).seed == 2**64 - 1
    with pytest.raises(ConfigError, match=r"config\.yaml: model: is empty"):
        read_config_file(Path(write(tmp_path, "model: ''\n")))


def test_a_pipe_is_no_config_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"--config .*pipe.yaml: is no regular file"):
        read_config_file(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe.yaml: is no regular file"):
        read_json_table(tmp_path / "pipe.yaml", ConfigError)


def test_an_earlier_run_comes_between_the_file_and_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "batch_size: 2\nresume: true\nepochs: 2\n")
    given = given_settings(["-c", file, "--keep", "5"])
    assert given.values == {"batch_size": 2, "resume": True, "epochs": 2.0, "keep": 5}
    config = merge_settings(given, {"batch_size": 16, "seed": 16, "keep": 16, "iters": 16})
    assert (config.batch_size, config.keep, config.seed, config.save_every) == (2, 5, 16, TrainingConfig().save_every)
    assert (config.iters, config.epochs) == (None, 2.0)


def test_tables_come_from_the_file_and_keep_the_other_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "lora_parameters: {rank: 4}\noptimizer_config: {adamw: {weight_decay: 0.1}}\n")
    config = resolve(["-c", file])
    assert config.lora_parameters == {"rank": 4, "dropout": 0.0, "scale": 20.0}
    assert config.optimizer_config["adamw"] == {"bias_correction": True, "weight_decay": 0.1}


_TEXTS = {"columns": "prompt=text", "labels": "good,bad", "report_to": "wandb,tensorboard"}
_ALONE = (
    *("epochs", "fine_tune_type", "full_model", "lora_plus_ratio", "method", "reference", "sync_reference"),
    *("report_every", "router_aux_loss_coef", "test", *PARAMETERS),
)


def test_every_flag_sets_its_field() -> None:
    argv: list[str] = []
    expected: dict[str, Any] = {}
    values: dict[type, Any] = {int: 1, float: 0.5, str: "text"}
    for name, setting in SETTINGS.items():
        # Flags that are tried one by one below: they contradict others.
        if setting.kind is dict or setting.group in ("memory", "resume") or name in _ALONE:
            continue
        if setting.kind is bool:
            argv.append(f"--no-{setting.flag[2:]}" if setting.default else setting.flag)
            expected[name] = not setting.default
            continue
        value = setting.choices[-1] if setting.choices else _TEXTS.get(name, values[setting.kind])
        argv += [setting.flag, str(value)]
        expected[name] = value
    config = resolve([*argv, "--method", "dpo"])
    assert {name: getattr(config, name) for name in expected} == expected


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
            "--report-to 'wandb,tensorbord': found 'tensorbord', expected some of wandb, ",
        ),
        (["--report-to", "tensorbord"], "did you mean tensorboard?"),
        (["--report-to", ","], "--report-to ',': found an empty name, expected some of wandb, swanlab, tensorboard."),
        (["--project-name", "p"], "--project-name: is a project of --report-to wandb or swanlab; add that"),
        (["--project-name", "p", "--report-to", "tensorboard"], "--project-name: is a project of"),
        (["--sample-every", "0"], "--sample-every: found '0', expected a whole number greater than 0"),
        (["--sample-every", "5", "--samples", "0"], "--sample-every: --samples 0 leaves no prompt to answer"),
        (["--judge-prompts", "5"], "--judge-prompts says how many replies --evaluate-every judges; add that"),
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


def printed(argv: list[str], capsys: pytest.CaptureFixture[str], checkpoint: Mapping[str, Any] = EMPTY) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        merge_settings(given_settings([*argv, "--print-config"]), checkpoint)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_printed_settings_name_their_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "learning_rate: 1e-5\nseed: 3\nlora_parameters: {rank: 4}\n")
    argv = ["-c", file, "--seed", "4", "--grad-checkpoint"]
    lines = printed(argv, capsys, {"keep": 7, "seed": 9}).splitlines()
    for line in (
        "seed: 4  # flag",
        "learning_rate: 1.0e-05  # file",
        "keep: 7  # checkpoint",
        "batch_size: 4  # default",
        "memory: thrift  # flag",
        "grad_checkpoint: true  # flag",
        "  rank: 4  # file",
        "  scale: 20.0  # default",
        "iters: null  # default",
        "beta: null  # default: 0.1 (orpo)",
        "gamma: null  # default: orpo has none",
    ):
        assert line in lines, line
    names = [line.split(":")[0] for line in lines if line and line[0] not in "# "]
    assert sorted(names) == sorted(SETTINGS)


@pytest.mark.parametrize(("named", "source"), [(None, "MLX's default device"), ("gpu", VARIABLE)])
def test_the_devices_profile_is_printed_as_comments(
    named: str | None, source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if named is not None:
        monkeypatch.setenv(VARIABLE, named)
    profile = device_profile()
    lines = printed([], capsys).splitlines()
    start = lines.index(f"# device profile: {profile.name}, from {source}")
    assert all(line.startswith("#") for line in lines[start:])
    for name in {*DeviceProfile._fields, *RowLayout._fields} - {"name"}:
        assert sum(line.split(":")[0].strip("# ") == name for line in lines[start:]) == 1, name
    assert f"micro_batch_tokens: {profile.micro_batch_tokens}  # default: {profile.name} profile" in lines


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--test"],
        ["--no-shuffle", "--resume", "--clear-cache-threshold", "4GB"],
        ["--method", "sigmoid + 0.2*sft", "--beta", "0.3", "--epochs", "2", "--grad-checkpoint"],
        [
            "--data",
            "a: b # c",
            "--adapter-path",
            "1e-5",
            "--model",
            "null",
            "--columns",
            'prompt="q: 1",rejected=é\u202e',
        ],
    ],
)
def test_the_printed_settings_are_taken_back(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "lora_parameters: {keys: [self_attn.q_proj, '1e3'], rank: 2}\noptimizer_config: {adamw: {betas: [0.9, 0.98]}}\n"
        "lr_schedule: {name: cosine_decay, warmup: 10, warmup_init: 1e-7, arguments: [1e-5, 1000, 1e-7]}\n"
    )
    argv = [*argv, "-c", write(tmp_path, text)]
    out = printed(argv, capsys)
    assert all(line.isprintable() for line in out.splitlines())
    (tmp_path / "again.yaml").write_text(out)
    assert resolve(["-c", str(tmp_path / "again.yaml")]) == resolve(argv)


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
        (f"iters: 0x{'f' * 5000}", "found a number of thousands of digits, expected a whole number"),
        ("seed: 99999999999999999999", "seed: found 99999999999999999999, expected a whole number"),
    ],
)
def test_a_bad_file_names_the_file_and_key(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_config_file(Path(file))
    assert file in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
