"""Adapters of models inside of vision-language checkpoints, against PEFT's log-probs, and merged into their places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.cli.convert import main
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


def test_experts_that_are_stored_by_number_are_merged(tmp_path: Path) -> None:
    """Mixtral's w1, w2, w3: mlx-lm's own reader is the judge."""
    model = make_model("mixtral")
    weights = dict(tree_flatten(model.parameters()))
    by_number = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    stored = {}
    for name, array in weights.items():
        layer, stacked, rest = name.partition(".switch_mlp.")
        for expert in range(array.shape[0]) if stacked else ():
            stored[f"{layer}.experts.{expert}.{by_number[rest.partition('.')[0]]}.weight"] = array[expert]
        if not stacked:
            stored[name] = array
    base = tmp_path / "base"
    base.mkdir()
    mx.save_safetensors(str(base / "model.safetensors"), stored)
    (base / "config.json").write_text(json.dumps(model_config("mixtral")))
    lora = {"rank": 2, "scale": 3.0, "dropout": 0.0}
    add_adapters(model, "lora", -1, lora)
    trainable = dict(tree_flatten(model.trainable_parameters()))
    trained = {name: mx.random.normal(array.shape) * 0.1 for name, array in trainable.items()}
    assert any("switch_mlp" in name for name in trained)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), trained)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora})
    )
    merged = str(tmp_path / "merged")
    assert main(["merge", "--model", str(base), "--adapter-path", str(adapter), merged]) == 0
    assert set(tensors(f"{merged}/model.safetensors")) == set(stored)
