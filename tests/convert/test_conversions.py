"""Conversions from the command line: what comes out is the model that went in, or nothing comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from orpo_mlx.cli import score
from orpo_mlx.cli.convert import main
from orpo_mlx.convert import task, write_model
from orpo_mlx.models.adapters import adapter_weights, add_adapters
from orpo_mlx.models.loading import load
from tests.conftest import make_model, write_model_folder
from tests.engine.test_pair_scorer import oracle_logps

PARITY = ["gemma2", "llama_tied", "phi3", "qwen2", "granite", "qwen3_moe"]
LORA: dict[str, Any] = {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}


def worst_difference(model: str, data: Path, output: Path) -> float:
    assert score.main(["--model", model, "--data", str(data), "--per-token", "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    expected = json.loads(data.read_text())
    return max(
        float(np.abs(np.array(row[key]) - np.array(other[key])).max())
        for row, other in zip(found, expected, strict=True)
        for key in ("chosen_token_logps", "rejected_token_logps")
    )


@pytest.mark.parametrize("name", PARITY)
def test_a_checkpoint_of_transformers_5_scores_as_pytorch_does(shared: Path, tmp_path: Path, name: str) -> None:
    source, target = shared / "parity" / name, tmp_path / "mlx"
    assert main(["hf", str(source), str(target), "--no-verify"]) == 0
    assert worst_difference(str(target), source / "reference.json", tmp_path / "scores.jsonl") <= 1e-4
    raw, written = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    assert {key: written[key] for key in raw} == raw
    assert (target / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    # mlx-lm alone, which reads the original wrongly or not at all, is right on the converted folder.
    model, _ = mlx_lm.utils.load_model(target)
    model.set_dtype(mx.float32)
    row = json.loads((source / "reference.json").read_text())[0]
    expected = oracle_logps(model, row["prompt_ids"], row["chosen_ids"])
    np.testing.assert_allclose(expected, row["chosen_token_logps"], atol=1e-4)


@pytest.mark.parametrize(("bits", "bound"), [("8", 0.1), ("4", 5.0)])
def test_quantised(shared: Path, tmp_path: Path, bits: str, bound: float, capsys: pytest.CaptureFixture[str]) -> None:
    source = shared / "parity" / "llama_tied"
    command = ["hf", str(source), str(tmp_path / "q"), "--quantize", "--bits", bits, "--group-size", "32"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert float(said.split("mean ")[1].split()[0]) <= bound
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization"]["bits"] == int(bits)
    assert "model.layers.0.mlp.up_proj.scales" in mx.load(str(tmp_path / "q" / "model.safetensors"))


def test_dtype_tokenizer_and_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write_model_folder(tmp_path / "hf"), tmp_path / "mlx"
    assert main(["hf", str(source), str(target), "--dtype", "bfloat16"]) == 0
    weights = mx.load(str(target / "model.safetensors"))
    assert isinstance(weights, dict)
    assert {array.dtype for array in weights.values()} == {mx.bfloat16}
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert main(["hf", str(source), str(target)]) == 2
    assert "exists already; give --overwrite" in capsys.readouterr().err
    assert main(["hf", str(source), str(target), "--overwrite"]) == 0
    assert next(iter(mx.load(str(target / "model.safetensors")).values())).dtype == mx.float32  # type: ignore[union-attr]
    assert sorted(path.name for path in tmp_path.iterdir() if "cache" not in path.name) == ["hf", "mlx"]


def sharded(folder: Path) -> Path:
    """A model in two shards with an index, and a file beside them that is no part of it."""
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in part})
    table = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    mx.save_safetensors(str(folder / "model.safetensors"), {name: 0 * array for name, array in weights.items()})
    return folder


def test_shards_are_those_of_the_index_and_no_others(tmp_path: Path) -> None:
    source = sharded(write_model_folder(tmp_path / "hf"))
    assert main(["hf", str(source), str(tmp_path / "mlx")]) == 0
    ids = mx.array([[3, 4, 5]])
    assert mx.array_equal(load(str(tmp_path / "mlx")).model(ids), make_model()(ids)).item()


def write_adapter_folder(folder: Path, kind: str = "llama", fine_tune_type: str = "lora", **lora: Any) -> Path:
    """Random adapters, as `train` writes them."""
    model = make_model(kind)
    lora = {**LORA, **lora}
    add_adapters(model, fine_tune_type, -1, lora)
    mx.random.seed(5)
    weights = {
        name: 0.1 * mx.random.normal(value.shape) + (name.endswith(".m"))
        for name, value in adapter_weights(model).items()
    }
    if fine_tune_type == "full":
        weights = {name: value + weights[name] for name, value in adapter_weights(model).items()}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": fine_tune_type, "num_layers": -1, "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "fine_tune_type", "lora"),
    [
        ("llama", "lora", {}),
        ("llama", "dora", {}),
        ("llama", "full", {}),
        ("qwen2", "lora", {}),
        ("mixtral", "lora", {"keys": ["self_attn.v_proj"]}),
    ],
)
def test_merged_is_the_adapted_model_under_the_checkpoints_names(
    tmp_path: Path, kind: str, fine_tune_type: str, lora: dict[str, Any]
) -> None:
    source = write_model_folder(tmp_path / "hf", kind)
    adapter = write_adapter_folder(tmp_path / "adapters", kind, fine_tune_type, **lora)
    target = tmp_path / "merged"
    assert main(["merge", "--model", str(source), "--adapter-path", str(adapter), str(target)]) == 0
    adapted: Any = mlx_lm.load(str(source), adapter_path=str(adapter))[0]
    ids = mx.array([[3, 4, 5, 6]])
    np.testing.assert_allclose(np.array(mlx_lm.load(str(target))[0](ids)), np.array(adapted(ids)), rtol=1e-4, atol=1e-3)
    before, after = mx.load(str(source / "model.safetensors")), mx.load(str(target / "model.safetensors"))
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert {name: array.shape for name, array in after.items()} == {name: array.shape for name, array in before.items()}
    changed = {name for name in before if not mx.array_equal(before[name], after[name]).item()}
    trained = mx.load(str(adapter / "adapters.safetensors"))
    assert isinstance(trained, dict)
    assert changed == {name if fine_tune_type == "full" else f"{name.rpartition('.')[0]}.weight" for name in trained}


def test_merging_into_a_quantised_model_writes_floating_point_or_quantised(tmp_path: Path) -> None:
    source = write_model_folder(tmp_path / "hf")
    assert main(["hf", str(source), str(tmp_path / "q8"), "--quantize", "--bits", "8", "--group-size", "32"]) == 0
    adapter = write_adapter_folder(tmp_path / "adapters")
    command = ["merge", "--model", str(tmp_path / "q8"), "--adapter-path", str(adapter)]
    assert main([*command, str(tmp_path / "float")]) == 0
    assert "quantization" not in json.loads((tmp_path / "float" / "config.json").read_text())
    assert main([*command, str(tmp_path / "again"), "--quantize", "--bits", "8", "--group-size", "32"]) == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization"]["bits"] == 8


def test_biases_of_adapted_layers_stay_as_they_are(tmp_path: Path) -> None:
    source = write_model_folder(tmp_path / "hf", "qwen2")
    adapter = write_adapter_folder(tmp_path / "adapters", "qwen2", keys=["self_attn.k_proj"])
    words = ["merge", "--model", str(source), "--adapter-path", str(adapter), str(tmp_path / "q8"), "--quantize"]
    assert main([*words, "--bits", "8", "--group-size", "32"]) == 0
    before, after = mx.load(str(source / "model.safetensors")), mx.load(str(tmp_path / "q8" / "model.safetensors"))
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    biases = [name for name in before if name.endswith("proj.bias")]
    assert any("k_proj" in name for name in biases)
    for name in biases:
        assert after[name].dtype == mx.float32
        assert mx.array_equal(before[name], after[name]).item()


def test_a_tied_head_that_is_stored_twice_goes_with_its_embedding(tmp_path: Path) -> None:
    source = write_model_folder(tmp_path / "hf", "qwen2")
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    mx.save_safetensors(
        str(source / "model.safetensors"), {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 0.0}
    )
    adapter = write_adapter_folder(tmp_path / "adapters", "qwen2", keys=["model.embed_tokens"])
    words = ["merge", "--model", str(source), "--adapter-path", str(adapter), str(tmp_path / "merged")]
    assert main(words) == 0
    after = mx.load(str(tmp_path / "merged" / "model.safetensors"))
    assert isinstance(after, dict)
    assert "lm_head.weight" not in after
    assert not mx.array_equal(after["model.embed_tokens.weight"], weights["model.embed_tokens.weight"]).item()


def test_a_conversion_that_changes_the_model_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model_folder(tmp_path / "hf")
    take = write_model.take_weights
    monkeypatch.setattr(task, "take_weights", lambda model: {name: array * 1.01 for name, array in take(model).items()})
    assert main(["hf", str(source), str(tmp_path / "mlx")]) == 2
    assert "verification failed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
