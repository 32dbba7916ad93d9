"""Weights in a form that mlx-lm cannot read: the form is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

from orpo_mlx.errors import ModelError
from orpo_mlx.models.loading import find
from orpo_mlx.models.stored.stored_formats import check_format
from tests.conftest import make_model, model_config


def folder(path: Path, extra: dict[str, Any], **config: Any) -> Path:
    parameters = dict(tree_flatten(make_model("llama").parameters()))
    weights = {name: np.array(array) for name, array in parameters.items()}
    save_file({**weights, **extra}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**model_config("llama"), **config}))
    return path


BNB = {"model.layers.0.mlp.up_proj.weight.absmax": np.zeros(4, np.float32)}


@pytest.mark.parametrize(
    ("extra", "config", "named"),
    [
        (BNB, {}, "bitsandbytes"),
        (BNB, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({}, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "FP8"),
        ({}, {"quantization_config": {"quant_method": "torchao"}}, "torchao"),
        ({}, {"quantization_config": {"quant_method": "hqq"}}, "hqq"),
    ],
)
def test_the_form_is_named(extra: dict[str, Any], config: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"its weights are quantised by {named}, which mlx-lm cannot read"):
        find(str(folder(tmp_path, extra, **config)))


def test_eight_bit_floats_are_known_by_their_type(tmp_path: Path) -> None:
    header = json.dumps({"a.weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelError, match="quantised by FP8"):
        check_format({"model_type": "llama"}, tmp_path)
    # This class of mlx-lm's reads them.
    check_format({"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}, tmp_path)


def test_what_mlx_lm_reads_is_left_to_it(tmp_path: Path) -> None:
    config = {"quantization": {"group_size": 64, "bits": 4}}
    assert find(str(folder(tmp_path, {}, **config))).config["quantization"]
