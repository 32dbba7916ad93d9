"""Config files of mlx_lm.lora, taken as they are or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlx_lm.lora import CONFIG_DEFAULTS

from orpo_mlx.cli.train import main
from orpo_mlx.config.command_line import read_config_file, resolve
from orpo_mlx.config.mlx_lm_keys import KEYS
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.errors import ConfigError
from tests.conftest import CONFIGS, make_pairs, write_id_rows, write_model_folder
from tests.training.evaluating.test_evaluate_only import lines_of

# The keys of mlx-lm's own mlx_lm/examples/lora_config.yaml, all of them, with the values they have there.
EXAMPLE = """\
model: "mlx_model"
train: true
fine_tune_type: lora
training_mode: normal
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
data: "/path/to/training/data"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""


def config_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with mlx-lm's example for a tiny model of 16 layers; changed are the model, `data` and `method`."""
    monkeypatch.setitem(CONFIGS, "deep", {**CONFIGS["llama"], "num_hidden_layers": 16})
    write_model_folder(tmp_path / "mlx_model", "deep")
    for split, seed in (("train", 0), ("valid", 1), ("test", 2)):
        write_id_rows(tmp_path / "pairs" / f"{split}.jsonl", make_pairs(8, seed=seed))
    config_file(tmp_path, EXAMPLE.replace("/path/to/training/data", "pairs") + "method: dpo\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_mlx_lms_example_trains(example: Path) -> None:
    assert main(["-c", "config.yaml", "--iters", "3", "--no-report", "--no-memory-check", "--samples", "0"]) == 0
    written = json.loads((example / "adapters" / "adapter_config.json").read_text())
    assert (written["fine_tune_type"], written["num_layers"]) == ("lora", 16)
    assert written["lora_parameters"] == yaml.safe_load(EXAMPLE)["lora_parameters"]
    record = json.loads((example / "adapters" / "run.json").read_text())["settings"]
    assert record["optimizer_config"]["adamw"] == {
        "betas": [0.9, 0.98],
        "eps": 1e-6,
        "weight_decay": 0.05,
        "bias_correction": True,
    }
    rates = [
        row["learning_rate"] for row in lines_of(example / "adapters" / "metrics.jsonl") if row["split"] == "train"
    ]
    # Linear warmup over 100 steps from 1e-7 to 1e-5; the third step's rate.
    assert rates == [pytest.approx(1e-7 + 2 / 100 * (1e-5 - 1e-7), rel=1e-5)]


@pytest.mark.slow
def test_mlx_lms_example_trains_to_its_end(example: Path) -> None:
    assert main(["-c", "config.yaml"]) == 0
    rows = lines_of(example / "adapters" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "valid"] == [0, 200, 400, 600, 800, 1000]
    assert rows[-1]["loss"] != rows[1]["loss"]


# Of mlx-lm's settings these are added elsewhere.
NOT_YET = {"report_to", "project_name"}


def test_every_setting_of_mlx_lm_is_known(tmp_path: Path) -> None:
    table = {key: value for key, value in CONFIG_DEFAULTS.items() if key not in NOT_YET}
    # mlx-lm trains on the prompt by default; a method that learns from pairs does not.
    table |= {"train": True, "mask_prompt": True}
    values = read_config_file(Path(config_file(tmp_path, yaml.safe_dump(table))))
    assert values["clear_cache_threshold"] == 0
    assert values["num_layers"] == CONFIG_DEFAULTS["num_layers"]
    config = resolve(["-c", str(tmp_path / "config.yaml")])
    assert (config.iters, config.optimizer, config.test) == (1000, "adam", False)


@pytest.mark.parametrize(
    ("text", "flags", "test"),
    [
        ("train: true", [], False),
        ("{train: true, test: false}", [], False),
        ("{train: true, test: true}", [], False),
        ("{train: false, test: true}", [], True),
        ("test: true", [], True),
        ("{train: true, test: false}", ["--test"], True),
        ("train: false", ["--test"], True),
        ("{train: null, test: null}", [], False),
    ],
)
def test_train_and_test(tmp_path: Path, text: str, flags: list[str], test: bool) -> None:
    assert resolve(["-c", config_file(tmp_path, text), *flags]).test == test


@pytest.mark.parametrize(
    "text",
    [
        "mask_prompt: true",
        "{mask_prompt: true, nll: completion}",
        "{mask_prompt: false, nll: sequence}",
        "training_mode: normal",
        "{training_mode: dpo, method: dpo}",
        "config: null",
        "hf_dataset: null",
    ],
)
def test_keys_that_say_what_is_so_anyway(tmp_path: Path, text: str) -> None:
    config = resolve(["-c", config_file(tmp_path, text)])
    given = {"nll", "method"} & set(yaml.safe_load(text))
    settings, defaults = config.settings(), TrainingConfig().settings()
    assert {name for name in settings if settings[name] != defaults[name]} <= given


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: false", "train: false without test: true leaves nothing to do; set one of them to true."),
        ("{train: false, test: false}", "leaves nothing to do"),
        ("train: 1", "train: found 1, expected true or false."),
        ("mask_prompt: 'yes'", "mask_prompt: found 'yes', expected true or false."),
        (
            "mask_prompt: false",
            "mask_prompt: false contradicts nll: completion, by which the prompt is not trained on; leave it out, or "
            "set nll: sequence.",
        ),
        (
            "{mask_prompt: true, nll: sequence}",
            "mask_prompt: true contradicts nll: sequence, by which the prompt is trained on; leave it out, or set "
            "nll: completion.",
        ),
        ("training_mode: dpo", "training_mode: found 'dpo'; method says how to learn here"),
        ("config: other.yaml", "config: a config file cannot name another"),
        ("hf_dataset: {name: billsum}", "hf_dataset: give data: owner/name"),
        ("trian: true", "unknown key 'trian'; did you mean train?"),
    ],
)
def test_keys_that_ask_for_what_is_not_done(tmp_path: Path, text: str, expected: str) -> None:
    file = config_file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        resolve(["-c", file])
    assert str(caught.value).startswith(f"{file}: ")
    assert expected in str(caught.value)


def test_a_flag_decides_what_a_key_must_agree_with(tmp_path: Path) -> None:
    assert resolve(["-c", config_file(tmp_path, "mask_prompt: false"), "--nll", "sequence"]).nll == "sequence"


def test_no_key_is_a_setting() -> None:
    fields: dict[str, Any] = TrainingConfig().settings()
    assert not set(KEYS) & set(fields)
