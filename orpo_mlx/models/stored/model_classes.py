"""mlx-lm's classes for a config: of the model, of its settings, and of the settings of a text model inside it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx_lm.utils import MODEL_REMAPPING, _get_classes

from orpo_mlx.errors import ModelError
from orpo_mlx.text import printable

# Names that transformers 5 has for model types, and mlx-lm's modules for them, where mlx-lm does not know the new one.
RENAMED_TYPES = {
    "lfm2_vl": "lfm2-vl",
    "gemma4_unified_text": "gemma4_text",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
}

# By mlx-lm's module: module and class of the settings that its `text_config` is read with. mlx-lm states this only in
# the code of each constructor; a test holds the table against its modules.
_TEXT_CLASSES = {
    "deepseek_v41": ("deepseek_v41", "ModelArgs"),
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "muse_glimmer": ("muse_glimmer", "ModelArgs"),
    "muse_spark": ("muse_spark", "TextArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}
# Mistral 3 takes one of three, by the type of its text model.
_MISTRAL3_TEXTS = ("ministral3", "mistral4")


class Names(NamedTuple):
    """Settings that one of mlx-lm's classes reads."""

    accepted: set[str]
    required: set[str]


def model_classes(config: Mapping[str, Any]) -> tuple[Callable[[Any], nn.Module], Any]:
    """The classes of a model and of its settings.

    Raises:
        ModelError: mlx-lm has none for this model type.
    """
    stated = str(config.get("model_type"))
    try:
        model, args = _get_classes({**config, "model_type": RENAMED_TYPES.get(stated, stated)})
    except (ValueError, KeyError, SystemExit):  # One of mlx-lm's modules exits where a package is missing.
        shown = printable(repr(config.get("model_type")))[:80]
        raise ModelError(f"model_type {shown} is not one that mlx-lm can run.") from None
    return model, args


def text_args_class(config: Mapping[str, Any]) -> Any | None:
    """The class that reads this config's `text_config`; None where none is known."""
    stated = str(config.get("model_type"))
    module = MODEL_REMAPPING.get(stated, RENAMED_TYPES.get(stated, stated))
    if module == "mistral3":
        inner = (config.get("text_config") or {}).get("model_type")
        return _class(inner if inner in _MISTRAL3_TEXTS else "llama", "ModelArgs")
    return _class(*_TEXT_CLASSES[module]) if module in _TEXT_CLASSES else None


def names_of(args_class: Any) -> Names:
    """What a class of settings reads."""
    parameters = inspect.signature(args_class).parameters
    required = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    return Names(set(parameters), required)


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"mlx_lm.models.{module}"), name)
