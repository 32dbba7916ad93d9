"""Bring a checkpoint's config.json into the form mlx-lm's model classes read.

transformers 5 nests RoPE settings in `rope_parameters` and saves some settings under new names. mlx-lm 0.32 then falls
back to defaults in silence for some models (4 nats per token off for qwen2) and refuses others. What is nested in a
way not known here is refused by name, never guessed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from orpo_mlx.errors import ModelError
from orpo_mlx.models.stored.config_numbers import check_numbers
from orpo_mlx.models.stored.model_classes import Names, model_classes, names_of, text_args_class
from orpo_mlx.models.stored.tied_head import TIED

_FULL = "full_attention"
_SLIDING = "sliding_attention"
# mlx-lm's names for the period of a pattern of layers, and what its other layers are.
_PERIODS = {"sliding_window_pattern": _SLIDING, "full_attention_interval": "linear_attention"}
# Gemma 4 without the embeddings that its class has in every layer by default.
_NO_LAYER_INPUTS = ("gemma4_unified_text",)
# Settings of single layers, and what Gemma 4's class calls them where they hold for the full ones.
_OF_FULL_LAYERS = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
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
        ModelError: an architecture mlx-lm does not have, or settings it cannot express.
    """
    flat = dict(config)
    check_numbers(config, location)
    try:
        names = names_of(model_classes(flat)[1])
    except ModelError as error:
        raise ModelError(f"{location}: {error}") from None
    if isinstance(config.get("text_config"), dict):
        flat["text_config"] = _text_config(flat, location)
        stated = flat["text_config"].get("vocab_size")
        # mlx-lm's wrappers write their own number, or their default, over the text model's.
        if "vocab_size" in names.accepted and stated is not None:
            flat["vocab_size"] = stated
    elif (text_class := text_args_class(flat)) is not None:
        # Saved before there was a level of its own for them: mlx-lm's wrappers take the whole for the text model's.
        names = Names(names.accepted | names_of(text_class).accepted, names_of(text_class).required)
    return _for_class(flat, names, location)


def _text_config(config: Mapping[str, Any], location: str) -> dict[str, Any]:
    """The settings of the text model inside a vision-language model, all of them where its class looks for them."""
    text = {**config["text_config"]}
    text.setdefault("model_type", config.get("model_type"))
    args_class = text_args_class(config)
    if args_class is None:
        return _with_flat_rope(text, set(), location)
    names = names_of(args_class)
    outer = {name: config[name] for name in names.accepted - {"model_type"} if config.get(name) is not None}
    text = {**outer, **text}
    if isinstance(config.get(TIED), bool):
        text[TIED] = config[TIED]  # Where both say it, transformers 5 goes by the outer.
    # Only what transformers wrote leaves out the defaults of transformers' classes.
    if "transformers_version" in config:
        text = with_implied_defaults(text, names.accepted)
    return _for_class(text, names, location)


def _for_class(config: dict[str, Any], names: Names, location: str) -> dict[str, Any]:
    """One level of a config as the class that reads these `names` wants it."""
    flat = with_old_names(dict(config), names.accepted)
    if flat.get("model_type") in _NO_LAYER_INPUTS:
        flat["hidden_size_per_layer_input"] = 0
    flat = _with_flat_rope(flat, names.accepted, location)
    flat = with_implied_settings(flat, names.required)
    flat = with_layer_differences(flat, names.accepted, location)
    return with_layer_pattern(flat, names.accepted, location)


def with_implied_defaults(text: dict[str, Any], accepted: set[str]) -> dict[str, Any]:
    """A text model's settings with those that transformers left out when it wrote them.

    Of a config inside a config it writes only what differs from its class's defaults, and mlx-lm's are others: without
    them most small values, from heads to layer types, would be another model's.
    """
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    try:
        own: Mapping[str, Any] = auto.CONFIG_MAPPING[text.get("model_type")](**text).to_dict()
    except Exception:  # Unknown there, or its strict checks refuse it: mlx-lm says what it misses.
        return text
    renamed = {**_RENAMED_LATER, **_attribute_map(str(text.get("model_type")))}
    unread = {*renamed, *renamed.values(), "layer_types", "per_layer_config"} - accepted
    implied = {name: own[name] for name in accepted - {TIED, "model_type"} if name in own and name not in text}
    implied |= {name: own[name] for name in unread - set(text) if own.get(name) is not None}
    # Its reading of both old and new spelling: with the base that its class has by default.
    rope = {"rope_parameters": own["rope_parameters"]} if own.get("rope_parameters") else {}
    return {**text, **implied, **rope}


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
    implied = {
        "rope_scaling": None,
        "n_ctx": config.get("n_positions"),
        "block_dim": config.get("hidden_size"),
        # Qwen3-VL's experts have no such switch: they are always weighted to a sum of 1.
        "norm_topk_prob": True,
        TIED: False,
    }
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        implied["head_dim"] = hidden // heads
    return {**{name: value for name, value in implied.items() if name in required}, **config}


def with_layer_pattern(config: dict[str, Any], accepted: set[str], location: str) -> dict[str, Any]:
    """The period of a model whose every n-th layer attends to everything, from transformers 5's list of layer types."""
    types = config.get("layer_types")
    name = next((name for name in _PERIODS if name in accepted), None)
    if not types or name is None or "layer_types" in accepted:
        return config
    # No full layer at all: a pattern longer than the model.
    pattern = types.index(_FULL) + 1 if _FULL in types else len(types) + 1
    if types != [_PERIODS[name] if (layer + 1) % pattern else _FULL for layer in range(len(types))]:
        raise ModelError(f"{location}: layer_types is not a repeating pattern, which is all mlx-lm can express here.")
    return {**config, name: pattern}


def with_layer_differences(config: dict[str, Any], accepted: set[str], location: str) -> dict[str, Any]:
    """What transformers 5 says of single layers (`per_layer_config`) in the settings that Gemma 4's class has for all
    layers that attend to everything."""
    single = config.get("per_layer_config")
    if not single:
        return config
    types = config.get("layer_types") or []
    full = [str(index) for index, kind in enumerate(types) if kind == _FULL]
    tables = [single.get(index) for index in full]
    fits = set(map(str, single)) <= set(full) and all(table == tables[0] for table in tables)
    if not fits or any(_OF_FULL_LAYERS.get(key) not in accepted for key in tables[0] or ()):
        raise ModelError(
            f"{location}: per_layer_config makes single layers differ in a way that mlx-lm's "
            f"{config.get('model_type')} cannot express."
        )
    return {**config, **{_OF_FULL_LAYERS[key]: value for key, value in tables[0].items()}}


def unseen_window(config: Mapping[str, Any]) -> int | None:
    """The attention window of a model whose mlx-lm class ignores it; None where there is none or it is applied.

    Up to this many tokens the model is exact; beyond, mlx-lm lets every layer attend further than it was trained to.
    """
    window = config.get("sliding_window")
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return None
    accepted = names_of(model_classes(config)[1]).accepted
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
        if "rope_local_base_freq" in accepted and "rope_theta" in distinct[0]:
            config["rope_local_base_freq"] = distinct[0]["rope_theta"]
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
