"""What PEFT calls the tensors of an adapter, and the modules of transformers' models they belong to, in mlx-lm's words.

PEFT's A (r, in) and B (out, r) are mlx-lm's lora_a (in, r) and lora_b (r, out).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from orpo_mlx.errors import ModelError

PREFIX = "base_model.model."
LINEAR = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
EMBEDDING = {"lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b"}
# Before PEFT 0.10, and where it is written by others.
_OLD_MAGNITUDE = "lora_magnitude_vector.weight"
# PEFT stores an adapted embedding's own weights, or all of `modules_to_save`, as well.
_OF_BASE = ("base_layer.weight", "base_layer.bias", "modules_to_save.weight", "modules_to_save.bias", "weight", "bias")
_INNER = "language_model."
# Text models of a wrapped kind that are saved alone, and the one whose wrapper keeps a whole causal model inside.
_ALONE = ("qwen3_5_text", "qwen3_5_moe_text")
_WHOLE_INSIDE = ("llama4",)


class PeftTensors(NamedTuple):
    """The tensors of a PEFT adapter."""

    weights: dict[str, mx.array]
    """Matrices and magnitudes under mlx-lm's names, transposed."""
    modules: dict[str, str]
    """mlx-lm's name of each adapted module, and the one it has in the file."""
    unchanged: list[str]
    """Names of tensors that are the base model's own, equal to what this model has."""


def read_peft_tensors(tensors: Mapping[str, mx.array], model: nn.Module, location: str) -> PeftTensors:
    """A PEFT adapter's tensors for `model`, with or without adapters on it.

    Raises:
        ModelError: one is for a module that the model does not have, is of no LoRA or DoRA layer, or is a weight of the
            base model that differs from this one's.
    """
    names = {name for name, _ in model.named_modules()}
    read = PeftTensors({}, {}, [])
    for name, array in tensors.items():
        module, leaf = split_name(name, location)
        ours = our_module(module, names)
        if leaf in _OF_BASE:
            _check_unchanged(array, base_weight(model, ours or module, leaf.rpartition(".")[2]), module, location)
            read.unchanged.append(name)
            continue
        if ours is None:
            raise ModelError(f"{location}: adapts {module!r}, which this model does not have; check `model`.")
        read.modules[ours] = module
        table = {**LINEAR, **EMBEDDING, _OLD_MAGNITUDE: "m"}
        # A magnitude is a vector, whatever axes of length 1 were kept around it. Matrices are laid out as they would be
        # read from a file of mlx-lm's: products of a transposed view are rounded otherwise.
        read.weights[f"{ours}.{table[leaf]}"] = array.reshape(-1) if table[leaf] == "m" else mx.contiguous(array.T)
    return read


def split_name(name: str, location: str) -> tuple[str, str]:
    """Module and leaf of a PEFT tensor name."""
    # The base's own leaves last: those of LoRA and DoRA may end in ".weight" as well.
    for leaf in (_OLD_MAGNITUDE, *LINEAR, *EMBEDDING, *_OF_BASE):
        if name.startswith(PREFIX) and name.endswith(f".{leaf}"):
            return name[len(PREFIX) : -len(leaf) - 1], leaf
    raise ModelError(f"{location}: tensor {name!r} is of no LoRA or DoRA layer, so it cannot be expressed by mlx-lm.")


def our_module(theirs: str, modules: Collection[str]) -> str | None:
    """mlx-lm's name for a module of transformers'; None where the model has none."""
    return next((name for name in modules if theirs in stored_names(name)), None) if theirs not in modules else theirs


def stored_names(ours: str) -> list[str]:
    """Names under which checkpoints and adapters, of this or an earlier transformers, have a module of mlx-lm's."""
    if not ours.startswith(_INNER):
        return [ours]
    inner = ours.removeprefix(_INNER)
    return [ours, f"model.{_INNER}{inner.removeprefix('model.')}" if inner.startswith("model.") else inner, inner]


def their_module(ours: str, config: Mapping[str, Any]) -> str:
    """transformers 5's name for a module of mlx-lm's, by which PEFT looks for it."""
    if not ours.startswith(_INNER) or config.get("model_type") in _WHOLE_INSIDE:
        return ours
    _, modern, alone = stored_names(ours)
    return alone if config.get("model_type") in _ALONE else modern


def base_weight(model: nn.Module, module: str, leaf: str) -> mx.array | None:
    """A weight of the base model, also where an adapter is wrapped around it; a tied head's is the embedding's."""
    weights = dict(tree_flatten(model.parameters()))
    found = (weights.get(f"{module}.{inner}{leaf}") for inner in ("", "linear.", "embedding."))
    own = next((array for array in found if array is not None), None)
    if own is None and module.rpartition(".")[2] == "lm_head" and leaf == "weight":
        ends = (".embed_tokens.weight", ".embed_tokens.embedding.weight")
        own = next((array for name, array in weights.items() if f".{name}".endswith(ends)), None)
    return own


def _check_unchanged(stored: mx.array, own: mx.array | None, module: str, location: str) -> None:
    """Make sure that weights an adapter stores besides its matrices are the base model's own."""
    if own is None or own.shape != stored.shape or not mx.array_equal(own.astype(stored.dtype), stored).item():
        raise ModelError(
            f"{location}: holds weights of {module!r} itself that differ from this model's, which mlx-lm's adapters "
            "cannot express; merge them with PEFT."
        )
