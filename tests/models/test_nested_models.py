"""Vision-language checkpoints, as transformers 5 and 4 lay them out, against the log-probs PyTorch computes of them.

`nested_models.json` is made by `python -m tests.helpers.make_nested_models`, with torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from orpo_mlx.models.loading import load
from orpo_mlx.models.vocabulary import vocabulary_of
from tests.helpers.make_nested_models import IDS, VOCABULARY
from tests.helpers.named_weights import named_weights

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "nested_models.json").read_text())
# Whose names of modules and names on the Hub differ, so that versions of transformers have written either.
TWO_NAMINGS = [name for name, entry in STORED.items() if any("language_model.model." in key for key in entry["shapes"])]


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


def worst(folder: Path, name: str) -> float:
    logits = load(str(folder)).model(mx.array([IDS]))[0]
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    theirs: list[float] = STORED[name]["logps"]
    return max(abs(float(logps[place, token].item()) - theirs[place]) for place, token in enumerate(IDS[1:]))


@pytest.mark.parametrize("old", [False, True], ids=["5", "4"])
@pytest.mark.parametrize("name", STORED)
def test_log_probs_are_those_of_transformers(name: str, old: bool, tmp_path: Path) -> None:
    assert worst(write(tmp_path, name, old=old), name) < 1e-4


@pytest.mark.parametrize("name", [name for name in TWO_NAMINGS if name != "llama4"])
def test_either_naming_is_the_same_model(name: str, tmp_path: Path) -> None:
    assert worst(write(tmp_path, name, old=True, modules=True), name) < 1e-4


@pytest.mark.parametrize("name", STORED)
def test_ids_past_the_embedding_are_known_whatever_wraps_it(name: str, tmp_path: Path) -> None:
    assert vocabulary_of(load(str(write(tmp_path, name))).model) == VOCABULARY
