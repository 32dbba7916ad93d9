"""Adapters: off means the base model bit for bit, files are mlx-lm's, PEFT's matrices load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from orpo_mlx.data.batching import collate
from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.errors import ConfigError, ModelError
from orpo_mlx.models.adapters import (
    adapter_weights,
    adapters_merged,
    adapters_off,
    add_adapters,
    add_trained_adapters,
    load_adapter_file,
)
from orpo_mlx.models.peft_adapters import check_fits, read_adapter
from orpo_mlx.run_folder import ADAPTERS_FILE
from tests.conftest import make_model, make_pairs

LORA: dict[str, Any] = {"rank": 2, "scale": 4.0, "dropout": 0.0}


def adapted(kind: str = "llama", fine_tune_type: str = "lora", **lora: Any) -> nn.Module:
    model = make_model(kind)
    mx.random.seed(0)
    add_adapters(model, fine_tune_type, -1, {**LORA, **lora})
    return model


@pytest.mark.parametrize("fine_tune_type", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_off_is_the_base_model_bit_for_bit_before_and_after_steps(kind: str, fine_tune_type: str) -> None:
    base = make_model(kind)
    batch = collate(make_pairs(4))
    expected = pair_logps(PairScorer(base), batch)
    model = adapted(kind, fine_tune_type)
    scorer = PairScorer(model)
    optimizer = optim.Adam(learning_rate=0.05)
    for _ in range(4):
        with adapters_off(model):
            found = pair_logps(scorer, batch)
        for one, other in zip(found[:5], expected[:5], strict=True):
            assert mx.array_equal(one, other).item()
        _, gradients = nn.value_and_grad(model, lambda b: pair_logps(scorer, b).chosen.sum())(batch)
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
    # It is off only inside the block.
    assert not mx.allclose(pair_logps(scorer, batch).chosen, expected.chosen, atol=1e-2).item()


def test_off_covers_experts() -> None:
    base, model = make_model("mixtral"), adapted("mixtral")
    model.load_weights([(name, mx.ones(value.shape)) for name, value in adapter_weights(model).items()], strict=False)
    ids = mx.array([[3, 4, 5]])
    assert not mx.allclose(model(ids), base(ids), atol=1e-2).item()
    with adapters_off(model):
        assert mx.array_equal(model(ids), base(ids)).item()


# mlx-lm has no DoRA of experts.
@pytest.mark.parametrize(("kind", "fine_tune_type"), [("llama", "lora"), ("llama", "dora"), ("mixtral", "lora")])
def test_merged_is_the_same_function_without_adapters(kind: str, fine_tune_type: str) -> None:
    model = adapted(kind, fine_tune_type)
    model.load_weights(
        [(name, mx.full(value.shape, 0.02)) for name, value in adapter_weights(model).items()], strict=False
    )
    model.eval()
    ids = mx.array([[3, 4, 5]])
    before = model(ids)
    with adapters_off(model):
        assert not mx.allclose(model(ids), before, atol=1e-2).item()
    with adapters_merged(model):
        assert not any("lora" in name for name, _ in model.named_modules())
        assert mx.allclose(model(ids), before, atol=1e-4).item()
    assert mx.array_equal(model(ids), before).item()


@pytest.mark.parametrize("without", [adapters_off, adapters_merged])
def test_the_adapters_come_back_after_an_error(without: Any) -> None:
    model = adapted()
    names = set(adapter_weights(model))
    with pytest.raises(RuntimeError, match="inside"), without(model):
        raise RuntimeError("inside")
    assert set(adapter_weights(model)) == names


def test_layers_are_counted_from_the_last() -> None:
    model = make_model()
    add_adapters(model, "lora", 1, LORA)
    assert {name.split(".")[2] for name in adapter_weights(model)} == {"1"}


def test_full_trains_the_blocks_own_weights() -> None:
    model = make_model()
    add_adapters(model, "full", -1, LORA)
    names = set(adapter_weights(model))
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "model.embed_tokens.weight" not in names
    model = make_model()
    everything = set(dict(tree_flatten(model.parameters())))
    add_adapters(model, "full", -1, LORA, full_model=True)
    assert set(adapter_weights(model)) == everything
    model = make_model()
    add_adapters(model, "full", 1, LORA, full_model=True)
    assert set(adapter_weights(model)) == {name for name in everything if not name.startswith("model.layers.0.")}


def test_more_layers_than_there_are_and_keys_that_match_nothing() -> None:
    with pytest.raises(ConfigError, match="`num_layers=3`: the model has 2 layers"):
        add_adapters(make_model(), "lora", 3, LORA)
    for keys in (["nowhere"], ["self_attn.q_proj", "nowhere"], ["q_proj"]):
        with pytest.raises(ConfigError, match=rf"lora_parameters.keys: '{keys[-1]}' matches no layer"):
            add_adapters(make_model(), "lora", -1, {**LORA, "keys": keys})
    add_adapters(make_model(), "lora", -1, {**LORA, "keys": ["self_attn.q_proj", "mlp.up_proj"]})


def saved(folder: Path, model: nn.Module, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), adapter_weights(model))
    (folder / "adapter_config.json").write_text(json.dumps(config or {"lora_parameters": LORA}))
    return folder


def randomise(model: nn.Module) -> None:
    model.load_weights(
        [(name, mx.random.normal(value.shape)) for name, value in adapter_weights(model).items()], strict=False
    )


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    model, other = adapted(), adapted()
    randomise(model)
    load_adapter_file(other, saved(tmp_path / "a", model), 4.0)
    for name, value in adapter_weights(model).items():
        assert mx.array_equal(value, adapter_weights(other)[name]).item()


def test_peft_matrices_give_pefts_delta(tmp_path: Path) -> None:
    """PEFT adds (alpha / r) B A x to W x, with A (r, in) and B (out, r)."""
    model = adapted(keys=["self_attn.q_proj"])
    rng = np.random.default_rng(0)
    matrices = {}
    for layer in (0, 1):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        matrices[f"{prefix}.lora_A.weight"] = rng.standard_normal((2, 32)).astype(np.float32)
        matrices[f"{prefix}.lora_B.weight"] = rng.standard_normal((32, 2)).astype(np.float32)
    arrays = {name: mx.array(value) for name, value in matrices.items()}
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), arrays)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2}))
    load_adapter_file(model, tmp_path, 4.0)
    x = rng.standard_normal((1, 32)).astype(np.float32)
    base = np.array(make_model().model.layers[1].self_attn.q_proj.weight)
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    delta = 4.0 * matrices[f"{prefix}.lora_B.weight"] @ matrices[f"{prefix}.lora_A.weight"]
    found = np.array(model.model.layers[1].self_attn.q_proj(mx.array(x)))
    np.testing.assert_allclose(found, x @ (base + delta).T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        ({"lora_parameters": {**LORA, "scale": 20.0}}, "20"),
        ({"lora_alpha": 8, "r": 4}, "2"),
        ({"lora_alpha": 8, "r": 4, "use_rslora": True}, "4"),
    ],
)
def test_another_scale_is_another_model(tmp_path: Path, config: dict[str, Any], theirs: str) -> None:
    folder = saved(tmp_path / "a", adapted(), **config)
    with pytest.raises(ModelError, match=rf"made with LoRA scale {theirs}, this run has 3"):
        load_adapter_file(adapted(), folder, 3.0)


def write_peft(folder: Path, **config: Any) -> Path:
    """A PEFT adapter on the queries and values of both layers."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for layer in (0, 1):
        for module, outputs in (("q_proj", 32), ("v_proj", 16)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            arrays[f"{prefix}.lora_A.weight"] = mx.array(rng.standard_normal((2, 32)).astype(np.float32))
            arrays[f"{prefix}.lora_B.weight"] = mx.array(rng.standard_normal((outputs, 2)).astype(np.float32))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"alpha_pattern": {"v_proj": 64}}, "makes layers differ"),
        ({"alpha_pattern": {"layers.1.self_attn.v_proj": 64}}, "makes layers differ"),
        ({"alpha_pattern": {"q_proj": 64, "v_proj": 64}}, "made with LoRA scale 32, this run has 4"),
        ({"rank_pattern": {"v_proj": 1}}, "makes layers differ"),
        ({"alpha_pattern": {"(": 1}}, "cannot be read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"bias": "all"}, "trained biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"use_something_new": True}, "use_something_new"),
    ],
)
def test_what_a_peft_config_says_is_meant_or_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = adapted(keys=["self_attn.q_proj", "self_attn.v_proj"])
    with pytest.raises(ModelError, match=re.escape(said)):
        load_adapter_file(model, write_peft(tmp_path / "peft", **config), 4.0)


@pytest.mark.parametrize(
    "config",
    [{}, {"alpha_pattern": {"v_proj": 8}}, {"modules_to_save": ["embed_tokens"]}, {"init_lora_weights": "gaussian"}],
)
def test_what_changes_nothing_is_taken(config: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(keys=["self_attn.q_proj", "self_attn.v_proj"])
    folder = write_peft(tmp_path / "peft", **config)
    arrays = mx.load(str(folder / "adapter_model.safetensors"))
    assert isinstance(arrays, dict)
    arrays["base_model.model.model.embed_tokens.weight"] = model.model.embed_tokens.weight
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    load_adapter_file(model, folder, 4.0)
    arrays["base_model.model.model.embed_tokens.weight"] = model.model.embed_tokens.weight + 0.1
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    with pytest.raises(ModelError, match=r"weights of 'model.embed_tokens' itself that differ"):
        load_adapter_file(model, folder, 4.0)


def test_an_embedding_that_is_also_the_head_is_adapted_twice_here_and_once_by_peft(tmp_path: Path) -> None:
    model = adapted("qwen2", keys=["model.embed_tokens"])
    folder = tmp_path / "peft"
    folder.mkdir()
    own = adapter_weights(model)
    assert set(own) == {"model.embed_tokens.lora_a", "model.embed_tokens.lora_b"}
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    arrays = {f"{prefix}{name[-1].upper()}": array.T for name, array in own.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    with pytest.raises(ModelError, match="also uses as its head: mlx-lm adapts both uses and PEFT only one"):
        load_adapter_file(model, folder, 4.0)
    head = {"lora_A": mx.ones((2, 32)), "lora_B": mx.ones((259, 2))}
    arrays = {f"base_model.model.lm_head.{leaf}.weight": array for leaf, array in head.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    with pytest.raises(ModelError, match="adapts 'lm_head', and this model's head is its embedding"):
        load_adapter_file(model, folder, 4.0)


def test_peft_weights_alone_do_not_say_their_scale(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "peft")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config.json: is not there"):
        load_adapter_file(adapted(keys=["self_attn.q_proj", "self_attn.v_proj"]), folder, 4.0)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such adapter file"):
        load_adapter_file(adapted(), tmp_path / "nowhere.safetensors", 4.0)
    with pytest.raises(ModelError, match=r"lora_a has shape \(32, 3\), expected \(32, 2\).*and 25 more"):
        load_adapter_file(adapted(), saved(tmp_path / "rank", adapted(rank=3)), 4.0)
    with pytest.raises(ModelError, match=r"q_proj.lora_a is missing"):
        load_adapter_file(adapted(), saved(tmp_path / "keys", adapted(keys=["self_attn.v_proj"])), 4.0)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        load_adapter_file(adapted(), broken, 4.0)


@pytest.mark.parametrize(
    ("keys", "without", "said"),
    [
        (["auto"], "", r"mlp.down_proj.lora_a has no place in the model \(and 27 more\)"),
        (None, "layers.1.self_attn.q_proj.lora_a", r"layers.1.self_attn.q_proj.lora_a is not in the file \(and 0 more"),
    ],
)
def test_an_adapter_that_mlx_lm_would_load_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str] | None, without: str, said: str
) -> None:
    """Versions of mlx-lm differ in what they say of it; here it says nothing."""
    lora = {**LORA, **({"keys": keys} if keys else {})}
    folder = saved(tmp_path / "a", adapted(), fine_tune_type="lora", num_layers=-1, lora_parameters=lora)
    arrays = {name: value for name, value in adapter_weights(adapted()).items() if not without or without not in name}
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)

    def load_silently(model: nn.Module, path: str) -> nn.Module:
        linear_to_lora_layers(model, -1, lora)
        model.load_weights(f"{path}/adapters.safetensors", strict=False)
        return model

    monkeypatch.setattr("orpo_mlx.models.adapters.load_adapters", load_silently)
    with pytest.raises(ModelError, match=said):
        add_trained_adapters(make_model(), folder)


def test_a_rank_that_is_not_the_weights_is_no_end_of_the_process(tmp_path: Path) -> None:
    lora = {**LORA, "rank": 2**31 - 1}
    folder = saved(tmp_path / "a", adapted(), fine_tune_type="lora", num_layers=-1, lora_parameters=lora)
    said = "has lora_parameters.rank 2147483647, and no side of these weights is longer than"
    with pytest.raises(ModelError, match=said):
        add_trained_adapters(make_model(), folder)
    with pytest.raises(ModelError, match=said):
        check_fits(read_adapter(folder, ADAPTERS_FILE, source="SRC"), make_model(), str(folder))


def test_mlx_lm_reads_the_folder(tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    model = adapted()
    randomise(model)
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": LORA}
    other = load_adapters(make_model(), str(saved(tmp_path / "a", model, **config)))
    ids = mx.array([[3, 4, 5]])
    assert mx.array_equal(other(ids), model(ids)).item()


def test_frozen_parameters_stay_frozen() -> None:
    assert all(name.endswith(("lora_a", "lora_b")) for name in dict(tree_flatten(adapted().trainable_parameters())))
