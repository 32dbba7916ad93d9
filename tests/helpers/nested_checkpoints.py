"""The tiny vision-language checkpoints of `nested_models.json` as files, in several layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.helpers.make_nested_models import OUT, WEIGHTS
from tests.helpers.named_weights import named_weights

STORED: dict[str, Any] = json.loads(OUT.read_text())


def old_layout(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 writes it: RoPE in settings of its own, and nested only what differs from the defaults."""
    outer = json.loads(json.dumps(config))
    text = outer.pop("text_config")
    defaults = CONFIG_MAPPING[text["model_type"]]().to_dict()
    text = {key: value for key, value in text.items() if key == "model_type" or defaults.get(key, "") != value}
    rope = text.pop("rope_parameters", None)
    if "gemma4" in text["model_type"]:
        text["rope_parameters"] = rope
    elif rope is not None:
        sliding = rope.get("sliding_attention")
        rope = dict(rope.get("full_attention", rope))
        if sliding is not None:
            text["rope_local_base_freq"] = sliding["rope_theta"]
        text["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            text["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        if "mrope_section" in rope:
            text["rope_scaling"] = {**rope, "type": "mrope", "rope_type": "default"}
        elif rope["rope_type"] != "default":
            text["rope_scaling"] = rope
    single = text.pop("per_layer_config", None)
    for table in (single or {}).values():
        names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
        text |= {names[key]: value for key, value in table.items()}
    return {**outer, "text_config": text}


def module_names(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """As versions between write them: the names of transformers' modules."""
    changed = {}
    for name, array in weights.items():
        if name.startswith("language_model.model."):
            name = name.replace("language_model.model.", "model.language_model.", 1)
        elif name.startswith("language_model."):
            name = name.removeprefix("language_model.")
        elif name.startswith(("vision_tower.", "multi_modal_projector.")):
            name = f"model.{name}"
        changed[name] = array
    return changed


def write(folder: Path, name: str, *, old: bool = False, modules: bool = False) -> Path:
    entry = STORED[name]
    weights = {key: mx.array(array) for key, array in named_weights(entry["shapes"]).items()}
    if "prefix" in entry:
        weights = {key.replace("model.", entry["prefix"], 1): array for key, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), module_names(weights) if modules else weights)
    config = old_layout(entry["config"]) if old else entry["config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, name: str) -> Path:
    """The PEFT adapter that is stored for a checkpoint."""
    entry = STORED[name]["peft"]
    folder.mkdir()
    weights = {key: mx.array(array) for key, array in named_weights(entry["shapes"]).items()}
    mx.save_safetensors(str(folder / WEIGHTS), weights, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(entry["config"]))
    return folder
