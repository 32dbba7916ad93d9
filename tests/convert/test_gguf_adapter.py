"""LoRA adapters as GGUF: what llama.cpp would compute from the file is what mlx-lm computes from the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from orpo_mlx.cli.convert import main
from orpo_mlx.convert.gguf_adapter import as_gguf, read_arrays
from orpo_mlx.errors import ModelError
from orpo_mlx.files import save_adapters, save_json
from orpo_mlx.models.adapters import adapter_weights, add_adapters
from orpo_mlx.models.gguf.file import read_gguf
from orpo_mlx.models.gguf.loading import load_gguf
from orpo_mlx.models.peft_adapters import Adapter
from tests.conftest import make_model, write_model_folder
from tests.models.gguf.test_loading import write_gguf

LORA = {"rank": 4, "scale": 3.0, "dropout": 0.0}


def tuned(kind: str, folder: Path, **changes: object) -> mx.array:
    """Write random adapters for a tiny model into `folder`; the adapted model's logits on a few ids."""
    model = make_model(kind)
    add_adapters(model, "lora", -1, LORA)
    mx.random.seed(1)
    moved = [(name, 0.1 * mx.random.normal(value.shape)) for name, value in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    model.eval()
    folder.mkdir()
    save_adapters(folder, adapter_weights(model))
    save_json(
        folder / "adapter_config.json", {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": LORA, **changes}
    )
    logits: mx.array = model(mx.arange(1, 9)[None])
    return logits


def other_llama(folder: Path, **changes: int) -> Path:
    """A llama with other settings."""
    write_model_folder(folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    model_class, args_class = _get_classes(config)
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model_class(args_class.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi3"])
def test_a_gguf_model_with_the_files_product_is_the_adapted_model(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    expected = tuned(kind, tmp_path / "adapters")
    base = write_gguf(tmp_path / "base.gguf", kind)
    output = tmp_path / "adapters.gguf"
    assert main(["mlx-to-gguf", str(tmp_path / "adapters"), str(output), "--model", str(base)]) == 0
    file = read_gguf(output)
    assert (file.metadata["general.type"], file.metadata["adapter.type"]) == ("adapter", "lora")
    alpha = file.metadata["adapter.lora.alpha"]
    found = read_arrays(output)
    stored = read_arrays(base)
    # What llama.cpp adds to each weight of its file: α / r · B·A.
    changed = {}
    for name in {name.rpartition(".")[0] for name in found}:
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        changed[name] = mx.array(stored[name] + alpha / a.shape[0] * (b @ a))
    tables = {name: mx.array(array) for name, array in stored.items()} | changed
    model, _ = load_gguf(write_gguf(tmp_path / "merged.gguf", kind, tables))
    model.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(model(mx.arange(1, 9)[None])), np.array(expected), atol=2e-4)


def test_what_has_no_form_in_gguf_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned("llama", tmp_path / "dora", fine_tune_type="dora")
    tuned("mixtral", tmp_path / "experts")
    llama, mixtral = write_model_folder(tmp_path / "llama"), write_model_folder(tmp_path / "mixtral", "mixtral")
    tuned("llama", tmp_path / "plain")
    wider = other_llama(tmp_path / "wider", hidden_size=128, num_attention_heads=8)
    odd = other_llama(tmp_path / "odd", hidden_size=60, num_attention_heads=3, num_key_value_heads=3, head_dim=20)
    there = tmp_path / "there.gguf"
    there.write_bytes(b"")
    for source, model, target, message in (
        ("dora", llama, "a.gguf", "of type dora, and GGUF has LoRA alone"),
        ("experts", mixtral, "a.gguf", "a mixtral model's names in GGUF are not known"),
        ("dora", llama, "a.txt", "expected a file that ends in .gguf"),
        ("dora", llama, "there.gguf", "exists already; give --overwrite"),
        ("nowhere", llama, "a.gguf", "is no adapter folder"),
        # Of another width, and of heads that do not even divide its rows.
        ("plain", wider, "a.gguf", "check --model"),
        ("plain", odd, "a.gguf", "check --model"),
    ):
        argv = ["mlx-to-gguf", str(tmp_path / source), str(tmp_path / target), "--model", str(model)]
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


def test_ranks_that_differ_share_one_alpha() -> None:
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    rng = np.random.default_rng(0)
    weights = {}
    for name, rank in zip(names, (2, 4), strict=True):
        weights[f"{name}.lora_a"] = mx.array(rng.normal(size=(6, rank)).astype(np.float32))
        weights[f"{name}.lora_b"] = mx.array(rng.normal(size=(rank, 8)).astype(np.float32))
    adapter = Adapter({"lora_parameters": {"scale": 5.0}}, weights, {})
    found = as_gguf(adapter, {"model_type": "qwen2"}, None, "here")
    for number, name in enumerate(names):
        a, b = (found.tensors[f"blk.{number}.ffn_up.weight.{side}"] for side in ("lora_a", "lora_b"))
        expected = 5.0 * np.array(weights[f"{name}.lora_a"] @ weights[f"{name}.lora_b"]).T
        np.testing.assert_allclose(found.alpha / a.shape[0] * (b @ a), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=r"lora_parameters\.scale"):
        as_gguf(Adapter({}, weights, {}), {"model_type": "qwen2"}, None, "here")
