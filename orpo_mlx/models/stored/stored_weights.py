"""A checkpoint's weights under the names, and in the shapes, from which mlx-lm's classes know them.

Each class's `sanitize` takes the layout its model was first published in. transformers renames what it saves again, in
some versions to the names of its modules, splits or fuses experts, and leaves out tied heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from orpo_mlx.models.stored.tied_head import EMBEDDINGS, HEAD, PARTS, TIED, stem_of

Weights = dict[str, mx.array]

# Parts that mlx-lm's text-only classes have no use for, by the last name before them.
_OTHER_SENSES = (
    "visual",
    "vision_tower",
    "vision_model",
    "vision_embedder",
    "audio_tower",
    "multi_modal_projector",
    "embed_vision",
    "embed_audio",
)
_INNER = "language_model."
# Whose `sanitize` leaves that of the text model inside undone, and whose fails without a head, even where it is tied.
_INNER_NOT_CALLED = ("lfm2-vl", "lfm2_vl", "pixtral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
_HEAD_NOT_OPTIONAL = ("qwen3_vl_moe",)
_KEYS_AND_VALUES = re.compile(r"\.layers\.(\d+)\.self_attn\.[kv]_(?:proj|norm)\.weight$")
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.((?:gate|up|down)_proj)\.(.+)")


def class_for_stored(model_class: Callable[[Any], nn.Module], config: dict[str, Any]) -> Callable[[Any], nn.Module]:
    """A stand-in for `model_class`: builds the model so that its `sanitize` is given the names it knows.

    The model raises ValueError where the checkpoint has a head of its own and the class has no place for one.
    """

    def build(args: Any) -> nn.Module:
        model = model_class(args)
        own = getattr(model, "sanitize", lambda weights: weights)

        def sanitize(weights: Weights) -> Weights:
            del model.sanitize  # Only the loader's own call is stood in for.
            weights = _with_unused(own(known_weights(model, weights, config)), model, config)
            return _with_models_head(_as_inner_model_wants(model, weights, config), model, config)

        model.sanitize = sanitize
        return model

    return build


def without_weights(build: Callable[[Any], nn.Module], module: str) -> Callable[[Any], nn.Module]:
    """`build`, of a model to which a checkpoint's `module` is not given."""

    def build_without(args: Any) -> nn.Module:
        model = build(args)
        own = model.sanitize
        model.sanitize = lambda weights: own(
            {name: array for name, array in weights.items() if not name.startswith(f"{module}.")}
        )
        return model

    return build_without


def known_weights(model: nn.Module, weights: Weights, config: dict[str, Any]) -> Weights:
    """`weights` of a checkpoint as this model's own `sanitize` takes them."""
    parameters = dict(tree_flatten(model.parameters()))
    if any(name.startswith(f"{_INNER}model.") for name in parameters):
        weights = _with_inner_names(weights)
        weights = _with_fused_shapes(_with_stacked_experts(weights, parameters), parameters)
    if config.get("model_type") in _HEAD_NOT_OPTIONAL and stem_of(weights, (HEAD,)) is None:
        weights = {**weights, **_copied(weights, f"{_INNER}{HEAD}")}
    return weights


def _with_inner_names(weights: Weights) -> Weights:
    """As first published: `language_model.model.*` and `language_model.lm_head.*`, and nothing of other senses."""
    renamed = {}
    for name, array in weights.items():
        first = name.removeprefix("model.").split(".")[0]
        if first in _OTHER_SENSES:
            continue
        if name.startswith(f"model.{_INNER}"):
            name = f"{_INNER}model.{name.removeprefix(f'model.{_INNER}').removeprefix('model.')}"
        elif name.startswith((f"{HEAD}.", "model.")):
            name = _INNER + name
        renamed[name] = array
    return renamed


def _with_stacked_experts(weights: Weights, parameters: Weights) -> Weights:
    """Experts that are stored one by one, where the model has them in one array and its class wants them fused."""
    parts: dict[str, dict[int, mx.array]] = {}
    rest = {}
    for name, array in weights.items():
        found = _EXPERT.fullmatch(name)
        stacked = f"{found[1]}.switch_mlp.{found[3]}.{found[4]}" if found else ""
        if found and f"{found[1]}.switch_mlp.{found[3]}.weight" in parameters:
            parts.setdefault(stacked, {})[int(found[2])] = array
        else:
            rest[name] = array
    return rest | {name: mx.stack([array for _, array in sorted(each.items())]) for name, each in parts.items()}


def _with_fused_shapes(weights: Weights, parameters: Weights) -> Weights:
    """Qwen3-VL's experts as published, (E, in, out): transformers 5 saves them (E, out, in), and tells by the shape."""
    changed = dict(weights)
    for name, array in weights.items():
        layer, _, leaf = name.rpartition(".experts.")
        own = parameters.get(f"{layer}.switch_mlp.down_proj.weight")
        if own is None or leaf not in ("gate_up_proj", "down_proj") or array.ndim != 3:
            continue
        experts, hidden, inner = own.shape
        saved_again = (experts, 2 * inner, hidden) if leaf == "gate_up_proj" else (experts, hidden, inner)
        if array.shape == saved_again:
            changed[name] = array.swapaxes(1, 2)
    return changed


def _as_inner_model_wants(model: nn.Module, weights: Weights, config: dict[str, Any]) -> Weights:
    """What `sanitize` of the text model inside makes of its weights, for wrappers that do not call it."""
    inner = getattr(model.get("language_model"), "sanitize", None)
    if inner is None or config.get("model_type") not in _INNER_NOT_CALLED:
        return weights
    own = {name.removeprefix(_INNER): array for name, array in weights.items() if name.startswith(_INNER)}
    rest = {name: array for name, array in weights.items() if not name.startswith(_INNER)}
    return rest | {_INNER + name: array for name, array in inner(own).items()}


def _with_unused(weights: Weights, model: nn.Module, config: dict[str, Any]) -> Weights:
    """With keys and values of layers that take an earlier layer's: transformers 5 no longer saves what it never reads,
    and mlx-lm's Gemma 3n has a place for it."""
    text = config.get("text_config") or config
    shared = text.get("num_kv_shared_layers") or 0
    first = (text.get("num_hidden_layers") or 0) - shared
    parameters = dict(tree_flatten(model.parameters())) if shared else {}
    unused = {
        name: array
        for name, array in parameters.items()
        if name not in weights and (found := _KEYS_AND_VALUES.search(name)) and int(found[1]) >= first
    }
    return {**weights, **{name: mx.zeros_like(array) for name, array in unused.items()}}


def _with_models_head(weights: Weights, model: nn.Module, config: dict[str, Any]) -> Weights:
    """With a head if and only if the model has one: where the two are tied, the embedding itself, which takes no more
    memory, for classes that cannot tie; and none for classes that cannot do otherwise."""
    own = stem_of(dict(tree_flatten(model.parameters())), (HEAD,))
    stored = stem_of(weights, (HEAD,))
    if own is None and stored is not None:
        if config.get(TIED) is not True:
            raise ValueError(f"it has a head of its own, {stored}, which mlx-lm's {config['model_type']} cannot have")
        return {name: array for name, array in weights.items() if not name.startswith(f"{stored}.")}
    if own is not None and stored is None and config.get(TIED) is True:
        return {**weights, **_copied(weights, own)}
    return weights


def _copied(weights: Weights, head: str) -> Weights:
    """The embedding's arrays under the head's name."""
    embedding = stem_of(weights, EMBEDDINGS)
    if embedding is None:
        return {}
    names = {leaf: f"{embedding}.{leaf}" for leaf in PARTS}
    return {f"{head}.{leaf}": weights[name] for leaf, name in names.items() if name in weights}
