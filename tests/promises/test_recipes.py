"""The configs for Macs fit them, and docs/recipes.md names what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlx_lm.lora import CONFIG_DEFAULTS

from orpo_mlx.cli.convert import build_parser as build_convert_parser
from orpo_mlx.cli.fit import main as fit
from orpo_mlx.config.checks import make_config
from orpo_mlx.config.command_line import build_parser, resolve
from orpo_mlx.config.mlx_lm_keys import KEYS
from orpo_mlx.config.settings import SETTINGS, TrainingConfig
from orpo_mlx.engine.modes import AUTOMATIC
from orpo_mlx.memory.cheap_products import cheap_products
from orpo_mlx.memory.fit import predicted
from orpo_mlx.memory.predict import TOLERANCE, recommended_working_set
from orpo_mlx.memory.skeleton import read_blueprint
from orpo_mlx.models.stored.safetensors_files import read_header
from tests.cli.test_flags import with_subcommands
from tests.helpers.predict_for_macs import ARCHITECTURES, CONFIGS, mac_gib, predictions, write_headers

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
FILES = sorted(CONFIGS.glob("*.yaml"))
PUBLISHED = {row[0]: row for row in json.loads((ROOT / "docs/results/figures/recipes.json").read_text())["rows"]}

# Billions of parameters of the text model, as the models' cards and papers have them.
PARAMETERS = {
    "SmolLM2-1.7B": 1.71, "Qwen3-1.7B": 1.72, "Qwen3-4B": 4.02, "Llama-3.2-3B": 3.21, "Llama-3.1-8B": 8.03,
    "gemma-3-1b": 1.0, "gemma-3-4b": 3.884, "gemma-3-12b": 11.771, "Qwen3.5-4B": 4.2, "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8, "Llama-3.3-70B": 70.6,
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_is_predicted_to_fit_its_mac(path: Path) -> None:
    config = resolve(["-c", str(path)])
    assert config.model in ARCHITECTURES
    name, size, method, tokens, memory, peak, recommended = PUBLISHED[path.name]
    assert (method, tokens) == (config.method, config.max_seq_length)
    # What auto takes where nothing faster fits.
    assert memory == (AUTOMATIC[-1] if config.memory == "auto" else config.memory)
    assert size == mac_gib(path)
    assert recommended == pytest.approx(recommended_working_set(size), abs=0.005)
    assert (1 + TOLERANCE) * peak <= recommended
    text = path.read_text()
    assert f"Mac with {size} GB" in text
    assert f"{tokens:,} tokens" in text
    assert f"-c data/configs/{name} " in text


def test_there_are_configs_for_four_macs_and_families_and_each_is_in_the_document() -> None:
    assert {mac_gib(path) for path in FILES} == {8, 16, 32, 64}
    models = {resolve(["-c", str(path)]).model for path in FILES}
    assert {family for family in ("Qwen", "Llama", "gemma", "SmolLM") if any(family in name for name in models)} == {
        "Qwen",
        "Llama",
        "gemma",
        "SmolLM",
    }
    assert set(PUBLISHED) == {path.name for path in FILES}
    assert all(f"`{path.name}`" in TEXT for path in FILES)


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_an_architecture_has_the_parameters_it_is_known_for(model: str, tmp_path: Path) -> None:
    folder = write_headers(tmp_path / "model", ARCHITECTURES[model])
    tensors = read_header(folder / "model.safetensors").tensors
    count = 0
    for name, tensor in tensors.items():
        size = 1
        for side in tensor.shape:
            size *= side
        # Eight 4-bit numbers to a word; scales and biases are no parameters.
        count += 8 * size if tensor.dtype == "U32" else 0 if name.endswith((".scales", ".biases")) else size
    expected = next(billions for name, billions in PARAMETERS.items() if name in model)
    assert count / 1e9 == pytest.approx(expected, rel=0.01)


SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["fast", "balanced", "thrift"])
def test_a_prediction_without_products_is_the_prediction(memory: str, tmp_path: Path) -> None:
    folder = str(write_headers(tmp_path / "model", SMALL))
    settings = {"model": folder, "max_seq_length": 256, "memory": memory, "batch_size": 2, "method": "dpo"}
    config, blueprint = make_config(settings), read_blueprint(folder, dtype="float32")
    real = predicted(config, blueprint)
    with cheap_products():
        cheap = predicted(config, blueprint)
    assert cheap.peak == pytest.approx(real.peak, rel=TOLERANCE)
    assert (cheap.weights, cheap.adapters, cheap.optimiser) == (real.weights, real.adapters, real.optimiser)


@pytest.mark.slow
def test_the_published_predictions_are_what_is_predicted(tmp_path: Path) -> None:
    found = list(predictions(tmp_path, ["8gb-qwen3-1.7b", "8gb-smollm2-1.7b"]))
    assert len(found) == 2
    for row in found:
        assert row == [
            pytest.approx(value, rel=TOLERANCE) if isinstance(value, float) else value for value in PUBLISHED[row[0]]
        ]


def test_fit_takes_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_headers(tmp_path / "model", SMALL))
    path = str(CONFIGS / "16gb-llama-3.2-3b.yaml")
    assert fit(["-c", path, "--model", folder, "--max-seq-length", "64", "--memory", "16"]) == 0
    assert "A Mac with 16 GiB recommends a working set of 10.67 GiB: it fits." in capsys.readouterr().out


def table(heading: str) -> list[list[str]]:
    """The rows of the table below a heading."""
    part = TEXT.split(heading, 1)[1]
    rows = re.search(r"\n\|---.*\n((?:\|.*\n)+)", part)
    assert rows is not None
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows[1].splitlines()]


@pytest.mark.parametrize("heading", ["## From TRL", "## From mlx-lm-lora"])
def test_every_flag_and_key_of_ours_exists(heading: str) -> None:
    parsers = [build_parser(), *with_subcommands(build_convert_parser())]
    flags = {word for parser in parsers for action in parser._actions for word in action.option_strings}
    found = 0
    for row in table(heading):
        assert len(row) == 2, row
        for code in re.findall(r"`([^`]+)`", row[1]):
            words = code.split()
            for word in words:
                if word.startswith("--"):
                    assert word in flags, word
                    found += 1
            if re.fullmatch(r"[a-z_]+\.[a-z]+", code):
                assert code.split(".")[0] in SETTINGS, code
            if words[0].startswith("--") and len(words) > 1:
                resolve(words)
    assert found > 10


def test_methods_of_the_same_name_exist() -> None:
    rows = [
        theirs
        for heading in ("## From TRL", "## From mlx-lm-lora")
        for theirs, ours in table(heading)
        if ours == "`--method` with the same name"
    ]
    assert len(rows) == 3
    for theirs in rows:
        names = [code.split()[-1] for code in re.findall(r"`([^`]+)`", theirs.split(":")[-1])]
        assert len(names) >= 3
        for name in names:
            assert resolve(["--method", name]).method == name


def test_the_defaults_beside_mlx_lms() -> None:
    ours = TrainingConfig().settings()
    theirs: dict[str, Any] = CONFIG_DEFAULTS
    shown = set()
    for name, left, right in table("What is not in a file has these defaults"):
        key, _, inner = name.strip("`").partition(".")
        shown.add(key)
        for value, cell in ((theirs[key], left), (ours[key], right)):
            expected = value[inner] if inner else value
            found = yaml.safe_load(cell.strip("`"))
            assert (float(found) == expected) if isinstance(expected, float) else (found == expected), name
    # And there are no others, but for names and for what mlx-lm has no say in.
    differing = {key for key in theirs if key in ours and theirs[key] != ours[key]}
    assert differing - {"model", "data", "optimizer_config"} <= shown
    assert all(f"`{key}" in TEXT for key in KEYS)
