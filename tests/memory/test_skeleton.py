"""A model's shape, known before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import save_model

from orpo_mlx.errors import ModelError
from orpo_mlx.memory.skeleton import build, layer_period, read_blueprint, weight_bytes
from orpo_mlx.models.loading import load
from tests.conftest import CONFIGS, make_model, model_config, write_model_folder
from tests.models.gguf.test_loading import write_gguf


def shapes(model: nn.Module) -> dict[str, Any]:
    return {name: (value.shape, value.dtype) for name, value in dict(tree_flatten(model.parameters())).items()}


def quantised_folder(folder: Path) -> Path:
    model = make_model()
    config = {**model_config("llama"), "quantization": {"group_size": 32, "bits": 4}}

    def choose(name: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and not name.endswith(("lm_head", "down_proj"))

    nn.quantize(model, 32, 4, class_predicate=choose)
    folder.mkdir()
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_built_is_what_is_loaded(kind: str, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / kind, kind, tokenizer=False)
    blueprint = read_blueprint(str(folder))
    layers = 4 if kind == "gemma4_shared" else 2
    assert blueprint.layers == layers
    assert shapes(build(blueprint, layers)) == shapes(load(str(folder)).model)


def test_a_quantised_model(tmp_path: Path) -> None:
    folder = quantised_folder(tmp_path / "model")
    built, loaded = build(read_blueprint(str(folder)), 2), load(str(folder)).model
    assert shapes(built) == shapes(loaded)
    assert weight_bytes(built) == weight_bytes(loaded) < weight_bytes(make_model())
    assert not hasattr(built.lm_head, "bits")


def test_a_head_that_the_checkpoint_has_not_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3's class makes a head of its own, and lets go of it when it loads weights without one."""
    text = {**CONFIGS["gemma"], "model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 16}
    monkeypatch.setitem(CONFIGS, "gemma3_text", text)
    folder = write_model_folder(tmp_path / "model", "gemma3_text", tokenizer=False)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    assert weights.pop("lm_head.weight") is not None
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    built = build(read_blueprint(str(folder)), 2)
    assert shapes(built) == shapes(load(str(folder)).model)
    assert "lm_head" not in built


def test_a_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    assert shapes(build(read_blueprint(str(path)), 2)) == shapes(load(str(path)).model)


def test_fewer_layers_and_another_dtype(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", tokenizer=False)
    whole = build(read_blueprint(str(folder), dtype="bfloat16"), 2)
    one = build(read_blueprint(str(folder), dtype="bfloat16"), 1)
    assert len(one.layers) == 1
    assert {value.dtype for _, value in dict(tree_flatten(one.parameters())).items()} == {mx.bfloat16}
    per_layer = sum(value.nbytes for value in dict(tree_flatten(whole.layers[1].parameters())).values())
    assert weight_bytes(whole) - weight_bytes(one) == per_layer


def test_layers_that_share_keys_and_values_keep_their_part(tmp_path: Path) -> None:
    blueprint = read_blueprint(str(write_model_folder(tmp_path / "model", "gemma4_shared", tokenizer=False)))
    deep = {"num_hidden_layers": 8, "layer_types": ["sliding_attention", "full_attention"] * 4}
    blueprint.config["text_config"] |= {**deep, "num_kv_shared_layers": 5}
    blueprint = blueprint._replace(layers=8)
    for layers, sharing in ((8, 5), (6, 3), (4, 2)):
        built: Any = build(blueprint, layers)
        assert sum(not layer.self_attn.has_kv for layer in built.layers) == sharing


@pytest.mark.parametrize(
    ("config", "weights", "expected"),
    [
        (None, b"", "no config.json in this folder"),
        ("{", b"", "cannot be read"),
        ('{"model_type": "llama", "num_hidden_layers": 2}', None, "no model*.safetensors with floating-point weights"),
        ('{"model_type": "llama", "num_hidden_layers": 2}', b"\x05\0\0\0\0\0\0\0{odd}", "not a safetensors file"),
        ('{"model_type": "llama", "num_hidden_layers": 2}', b"\xff" * 8, "not a safetensors file"),
    ],
)
def test_a_folder_that_is_no_model(config: str | None, weights: bytes | None, expected: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    if weights is not None:
        (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError) as caught:
        read_blueprint(str(tmp_path))
    assert expected in str(caught.value)


def test_a_config_without_layers_and_an_architecture_nobody_knows(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", tokenizer=False)
    config = model_config("llama")
    blueprint = read_blueprint(str(folder))
    with pytest.raises(ModelError, match="mlx-lm cannot build this model"):
        build(blueprint._replace(config={**config, "hidden_size": "odd"}), 1)
    del config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not say how many layers"):
        read_blueprint(str(folder))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1),
        ({"layer_types": ["a", "a", "a", "b"] * 2}, 4),
        ({"layer_types": ["a", "a", "b", "a", "a", "b", "a", "a"]}, 3),
        ({"layer_types": ["a"] * 7 + ["b"]}, 8),
        ({"sliding_window_pattern": 6}, 6),
        ({"layer_types": ["a", "b"] * 4, "num_kv_shared_layers": 4}, 4),
        ({"text_config": {"layer_types": ["a", "b"] * 4, "num_kv_shared_layers": 0}}, 2),
        ({"layer_types": ["a", "b"] * 4, "no_rope": [1, 1, 1, 0] * 2}, 4),
    ],
)
def test_layers_repeat_in_a_pattern(changes: dict[str, Any], expected: int) -> None:
    assert layer_period({**model_config("llama"), "num_hidden_layers": 8, **changes}, 8) == expected
