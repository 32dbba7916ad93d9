"""Bring a checkpoint's config.json into the form mlx-lm's model classes read.

transformers 5 nests RoPE settings in `rope_parameters` and saves some settings under new names. mlx-lm 0.32 then falls
back to defaults in silence for some models (4 nats per token off for qwen2) and refuses others. What is nested in a
way not known here is refused by name, never guessed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from mlx_lm.utils import _get_classes

from orpo_mlx.errors import ModelError

_FULL = "full_attention"
_SLIDING = "sliding_attention"
_ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")
# mlx-lm's own names for a setting, where they are not Hugging Face's.
_MLX_NAMES = {"rope_theta": ("rotary_emb_base",), "partial_rotary_factor": ("rotary_pct",)}

# Names that a checkpoint of a later transformers has, and the table of an earlier one does not know.
_RENAMED_LATER = {"num_experts": "num_local_experts"}


def normalise_config(config: Mapping[str, Any], location: str) -> dict[str, Any]:
    """`config` with RoPE settings and renamed keys where mlx-lm's model class looks for them.

    Args:
        config: a parsed config.json.
        location: where it came from, for the error.

    Raises:
        ModelError: an architecture mlx-lm does not have, or RoPE settings nested in an unknown way.
    """
    flat = dict(config)
    if isinstance(config.get("text_config"), dict):
        text_config = {**config["text_config"]}
        text_config.setdefault("model_type", config.get("model_type"))
        flat["text_config"] = _with_flat_rope(text_config, set(), location)
    try:
        _, args_class = _get_classes(flat)
    except (ValueError, KeyError, SystemExit):  # One of mlx-lm's modules exits where a package is missing.
        raise ModelError(
            f"{location}: model_type {config.get('model_type')!r} is not one that mlx-lm can run."
        ) from None
    parameters = inspect.signature(args_class).parameters
    accepted = set(parameters)
    required = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    flat = _with_flat_rope(with_old_names(flat, accepted), accepted, location)
    return with_layer_pattern(with_implied_settings(flat, required), accepted, location)


def with_old_names(config: dict[str, Any], accepted: set[str]) -> dict[str, Any]:
    """Settings that transformers saves under another name than mlx-lm's class asks for, by transformers' own table."""
    renamed = {**_RENAMED_LATER, **_attribute_map(str(config.get("model_type")))}
    for name in accepted - set(config):
        for other in (renamed.get(name), *(theirs for theirs, ours in renamed.items() if ours == name)):
            if other in config:
                config[name] = config[other]
    return config


def with_implied_settings(config: dict[str, Any], required: set[str]) -> dict[str, Any]:
    """Settings mlx-lm's class requires and transformers 5 leaves out, because others imply them."""
    implied = {"rope_scaling": None, "n_ctx": config.get("n_positions")}
    if "hidden_size" in config and "num_attention_heads" in config:
        implied["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return {**{name: value for name, value in implied.items() if name in required}, **config}


def with_layer_pattern(config: dict[str, Any], accepted: set[str], location: str) -> dict[str, Any]:
    """`sliding_window_pattern` (every n-th layer sees everything) from transformers 5's list of layer types."""
    types = config.get("layer_types")
    if not types or "sliding_window_pattern" not in accepted or "layer_types" in accepted:
        return config
    # No full layer at all: a pattern longer than the model.
    pattern = types.index(_FULL) + 1 if _FULL in types else len(types) + 1
    if types != [_SLIDING if (layer + 1) % pattern else _FULL for layer in range(len(types))]:
        raise ModelError(f"{location}: layer_types is not a repeating pattern, which is all mlx-lm can express here.")
    return {**config, "sliding_window_pattern": pattern}


def unseen_window(config: Mapping[str, Any]) -> int | None:
    """The attention window of a model whose mlx-lm class ignores it; None where there is none or it is applied.

    Up to this many tokens the model is exact; beyond, mlx-lm lets every layer attend further than it was trained to.
    """
    window = config.get("sliding_window")
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return None
    _, args_class = _get_classes(dict(config))
    accepted = set(inspect.signature(args_class).parameters)
    # A class that takes layer types applies windows by them, and without them not at all.
    applied = "sliding_window" in accepted and ("layer_types" not in accepted or config.get("layer_types"))
    return None if applied else window


def rope_note(config: Mapping[str, Any]) -> str | None:
    """What to know about RoPE settings that mlx-lm runs in another way than transformers; None where there is nothing.

    transformers switches longrope's factors by the length of the row, mlx-lm takes the long ones always.
    """
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) not in ("longrope", "su"):
        return None
    if scaling.get("short_factor") == scaling.get("long_factor"):
        return None
    return (
        "mlx-lm runs this model with its long-context RoPE factors at every length; PyTorch takes the short ones for "
        "rows within the original context, so log-probs differ from PyTorch's there."
    )


def _attribute_map(model_type: str) -> dict[str, str]:
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    try:
        return dict(auto.CONFIG_MAPPING[model_type].attribute_map)
    except KeyError:
        return {}


def _with_flat_rope(config: dict[str, Any], accepted: set[str], location: str) -> dict[str, Any]:
    """RoPE settings of `rope_parameters` at the top level, where mlx-lm's classes look for them."""
    nested = config.get("rope_parameters")
    if nested is None:
        return config
    if not isinstance(nested, dict):
        raise ModelError(f"{location}: rope_parameters is a {type(nested).__name__}, expected a table.")
    by_layer_type = {key: value for key, value in nested.items() if isinstance(value, dict)}
    if "rope_parameters" in accepted and by_layer_type:
        return config  # The model class reads the nested form itself.
    main = _main_rope(config, by_layer_type, accepted, location) if by_layer_type else nested
    for field in _ROPE_FIELDS:
        if main.get(field) is not None:
            # Under every name that some class of mlx-lm has for it; the others ignore it.
            for name in (field, *_MLX_NAMES[field]):
                config[name] = main[field]
    scaling = {key: value for key, value in main.items() if key not in _ROPE_FIELDS}
    if scaling.get("rope_type", "default") != "default":
        # Older mlx-lm classes look for "type", newer ones for "rope_type".
        config["rope_scaling"] = {"type": scaling["rope_type"], **scaling}
    return config


def _main_rope(
    config: dict[str, Any], by_layer_type: dict[str, dict[str, Any]], accepted: set[str], location: str
) -> dict[str, Any]:
    """The settings that hold for the whole model, from settings per layer type."""
    used = set(config.get("layer_types") or by_layer_type)
    distinct = [by_layer_type[key] for key in sorted(used & set(by_layer_type))]
    if distinct and all(each == distinct[0] for each in distinct):
        return distinct[0]
    # Gemma 3: sliding layers have a base of their own, and mlx-lm's class a setting for it.
    full = by_layer_type.get(_FULL)
    sliding = by_layer_type.get(_SLIDING)
    two_bases = full is not None and sliding is not None and sliding.get("rope_type", "default") == "default"
    if two_bases and "rope_local_base_freq" in accepted:
        config["rope_local_base_freq"] = by_layer_type[_SLIDING]["rope_theta"]
        return by_layer_type[_FULL]
    raise ModelError(
        f"{location}: rope_parameters is nested by {', '.join(sorted(by_layer_type))} with different settings, "
        f"which mlx-lm's {config.get('model_type')} cannot express; convert the model with a newer mlx-lm."
    )
