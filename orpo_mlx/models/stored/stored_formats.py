"""Quantised checkpoints of other libraries that mlx-lm cannot read are named, instead of their odd tensors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo_mlx.errors import ModelError
from orpo_mlx.models.stored.model_classes import model_classes
from orpo_mlx.models.stored.safetensors_files import read_header
from orpo_mlx.text import printable

# By transformers' `quant_method`: what mlx-lm reads; it refuses the forms of these that it does not know by itself.
_READ = ("awq", "bitnet", "compressed-tensors", "gptq", "modelopt", "mxfp4", "mxfp8")
_NAMES = {"bitsandbytes": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}
# What FP8's scales are called; the classes that read them mention it.
_FP8_SCALE = "weight_scale_inv"


def check_format(config: Mapping[str, Any], folder: Path) -> None:
    """Make sure that mlx-lm reads the form in which a folder's weights are stored.

    Raises:
        ModelError: it does not; or a weight file is damaged.
    """
    if "quantization" in config:
        return
    stated = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}
    form = stated.get("quant_method") if isinstance(stated, dict) else None
    found = _NAMES.get(str(form), str(form)) if form and form not in (*_READ, "fp8") else None
    if found is None and (form == "fp8" or form is None):
        found = _by_tensors(folder, form)
        if found == "FP8" and _reads_fp8(config, stated):
            found = None
    if found is not None:
        raise ModelError(
            f"{folder}: its weights are quantised by {printable(found)[:40]}, which mlx-lm cannot read for model_type "
            f"{printable(repr(config.get('model_type')))[:40]}; take the checkpoint it was made from, or dequantise it "
            "with transformers."
        )


def _by_tensors(folder: Path, form: Any) -> str | None:
    """The form that tensors show: bitsandbytes' statistics beside them, or 8-bit floats."""
    for file in sorted(folder.glob("model*.safetensors")):
        for name, tensor in read_header(file).tensors.items():
            if ".quant_state.bitsandbytes" in name or name.endswith((".weight.absmax", ".weight_format", ".SCB")):
                return "bitsandbytes"
            if tensor.dtype.startswith("F8_E"):
                return "FP8"
    return "FP8" if form == "fp8" else None


def _reads_fp8(config: Mapping[str, Any], stated: Mapping[str, Any]) -> bool:
    """Whether mlx-lm turns FP8 into something it runs: as MXFP8 where the blocks allow it, or in the model's class."""
    if stated.get("scale_fmt") == "ue8m0" and list(stated.get("weight_block_size") or ()) == [32, 32]:
        return True
    model_class: Any = model_classes(config)[0]
    source = inspect.getsource(sys.modules[model_class.__module__])
    inner = (config.get("text_config") or {}).get("model_type")
    module = sys.modules.get(f"mlx_lm.models.{inner}")
    return _FP8_SCALE in source or (module is not None and _FP8_SCALE in inspect.getsource(module))
