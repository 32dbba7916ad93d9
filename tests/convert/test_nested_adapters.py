"""Adapters of models inside of vision-language checkpoints, against PEFT's log-probs, and merged into their places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.cli.convert import main
from orpo_mlx.errors import ModelError
from orpo_mlx.models.adapters import add_adapters, add_trained_adapters, load_adapter_file
from orpo_mlx.models.loading import load
from tests.conftest import make_model, model_config
from tests.helpers.make_nested_models import ADAPTED, IDS, WEIGHTS
from tests.helpers.nested_checkpoints import STORED, write, write_adapter

KEYS = ["self_attn.q_proj", "mlp.down_proj"]


def logps(model: Any) -> list[float]:
    logits = model(mx.array([IDS]))[0]
    values = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return [float(values[place, token].item()) for place, token in enumerate(IDS[1:])]


def tensors(file: str) -> dict[str, mx.array]:
    loaded = mx.load(file)
    assert isinstance(loaded, dict)
    return loaded


def close(one: list[float], other: list[float]) -> bool:
    return max(abs(first - second) for first, second in zip(one, other, strict=True)) < 1e-4


@pytest.mark.parametrize("name", ADAPTED)
def test_log_probs_are_pefts_and_the_adapter_comes_back_and_merges(name: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = str(write(tmp_path / "base", name))
    peft = write_adapter(tmp_path / "peft", name)
    wanted = STORED[name]["peft"]["logps"]

    resumed = load(base).model
    lora = {"rank": 2, "scale": 3.0, "dropout": 0.0}
    add_adapters(resumed, "lora", -1, {**lora, "keys": KEYS})
    load_adapter_file(resumed, peft, 3.0)
    assert close(logps(resumed), wanted)

    ours, back, merged = (str(tmp_path / part) for part in ("ours", "back", "merged"))
    assert main(["peft-to-mlx", str(peft), ours, "--model", base]) == 0
    converted = load(base).model
    add_trained_adapters(converted, Path(ours))
    assert close(logps(converted), wanted)
    assert main(["mlx-to-peft", ours, back, "--model", base]) == 0
    assert set(tensors(f"{back}/{WEIGHTS}")) == set(STORED[name]["peft"]["shapes"])

    assert main(["merge", "--model", base, "--adapter-path", ours, merged]) == 0
    stored = tensors(f"{merged}/model.safetensors")
    assert {key: list(array.shape) for key, array in stored.items()} == STORED[name]["shapes"]
    assert close(logps(load(merged).model), wanted)


BY_NUMBER = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
LORA = {"rank": 2, "scale": 3.0, "dropout": 0.0}


@pytest.fixture
def mixtral(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with Mixtral's w1, w2, w3 by number, and an adapter of mlx-lm's on everything."""
    model = make_model("mixtral")
    stored = {}
    for name, array in dict(tree_flatten(model.parameters())).items():
        layer, stacked, rest = name.partition(".switch_mlp.")
        for expert in range(array.shape[0]) if stacked else ():
            stored[f"{layer}.experts.{expert}.{BY_NUMBER[rest.partition('.')[0]]}.weight"] = array[expert]
        if not stacked:
            stored[name] = array
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    mx.save_safetensors(str(base / "model.safetensors"), stored)
    (base / "config.json").write_text(json.dumps(model_config("mixtral")))
    add_adapters(model, "lora", -1, LORA)
    trainable = dict(tree_flatten(model.trainable_parameters()))
    trained = {name: mx.random.normal(array.shape) * 0.1 for name, array in trainable.items()}
    assert any("switch_mlp" in name for name in trained)
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), trained)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": LORA})
    )
    return base, adapter


def test_experts_that_are_stored_by_number_are_merged(tmp_path: Path, mixtral: tuple[Path, Path]) -> None:
    """mlx-lm's own reader is the judge."""
    base, adapter = mixtral
    merged = str(tmp_path / "merged")
    assert main(["merge", "--model", str(base), "--adapter-path", str(adapter), merged]) == 0
    assert set(tensors(f"{merged}/model.safetensors")) == set(tensors(f"{base}/model.safetensors"))


def test_experts_that_are_stored_by_number_go_to_peft_and_back(tmp_path: Path, mixtral: tuple[Path, Path]) -> None:
    """PEFT has a linear layer for each: W + (alpha / r) B A of its own. Its own names, by which it finds them."""
    base, adapter = mixtral
    peft, back = str(tmp_path / "peft"), str(tmp_path / "back")
    assert main(["mlx-to-peft", str(adapter), peft, "--model", str(base)]) == 0
    written, weights = tensors(f"{peft}/{WEIGHTS}"), tensors(f"{base}/model.safetensors")
    config = json.loads(Path(peft, "adapter_config.json").read_text())
    layer = "model.layers.1.block_sparse_moe.experts.3"
    assert {"w1", "w2", "w3"} <= set(config["target_modules"])
    assert written[f"base_model.model.{layer}.w2.lora_A.weight"].shape == (2, weights[f"{layer}.w2.weight"].shape[1])
    scale = config["lora_alpha"] / config["r"]
    for name, a in written.items():
        if name.endswith(".lora_A.weight"):
            b = written[name.replace("lora_A", "lora_B")]
            weights[f"{name.removeprefix('base_model.model.').removesuffix('.lora_A.weight')}.weight"] += scale * b @ a
    (tmp_path / "merged").mkdir()
    mx.save_safetensors(str(tmp_path / "merged" / "model.safetensors"), weights)
    shutil.copy(base / "config.json", tmp_path / "merged")
    wanted = logps(load(str(tmp_path / "merged")).model)
    resumed = load(str(base)).model
    add_adapters(resumed, "lora", -1, LORA)
    load_adapter_file(resumed, peft, 3.0)
    assert close(logps(resumed), wanted)
    assert main(["peft-to-mlx", peft, back, "--model", str(base)]) == 0
    one, other = tensors(f"{adapter}/adapters.safetensors"), tensors(f"{back}/adapters.safetensors")
    assert set(one) == set(other)
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    missing = f"base_model.model.{layer}.w2.lora_A.weight"
    mx.save_safetensors(f"{peft}/{WEIGHTS}", {name: array for name, array in written.items() if name != missing})
    with pytest.raises(ModelError, match="is of 4 experts, and the file has matrices of 3"):
        load_adapter_file(resumed, peft, 3.0)
