"""What PEFT calls the tensors of an adapter, and the modules of transformers' models they belong to, in mlx-lm's words.

PEFT's A (r, in) and B (out, r) are mlx-lm's lora_a (in, r) and lora_b (r, out). Experts are modules of their own for
PEFT, and for mlx-lm one stack: (E, r, in) and (E, out, r).
"""

from __future__ import annotations

import re
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
STACKED = ".switch_mlp."
"""mlx-lm's name for the experts of a layer in one array."""
BY_NUMBER = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""Mixtral's names of an expert's matrices."""
_INNER = "language_model."
# Text models of a wrapped kind that are saved alone, and the one whose wrapper keeps a whole causal model inside.
_ALONE = ("qwen3_5_text", "qwen3_5_moe_text")
_WHOLE_INSIDE = ("llama4",)


class PeftTensors(NamedTuple):
    """The tensors of a PEFT adapter."""

    weights: dict[str, mx.array]
    """Matrices and magnitudes under mlx-lm's names, transposed."""
    modules: dict[str, list[str]]
    """mlx-lm's name of each adapted module, and the one it has in the file, or those of its experts."""
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
    experts: dict[str, dict[int, mx.array]] = {}
    for name, array in tensors.items():
        module, leaf = split_name(name, location)
        stack, number = stack_of(module)
        ours = our_module(stack, names)
        if leaf in _OF_BASE:
            _check_unchanged(array, base_weight(model, ours or module, leaf.rpartition(".")[2]), module, location)
            read.unchanged.append(name)
            continue
        if ours is None and module.rpartition(".")[2] == "lm_head":
            raise ModelError(
                f"{location}: adapts {module!r}, and this model's head is its embedding, of which mlx-lm's adapters "
                "cannot change one use alone; merge it with PEFT, or check `model`."
            )
        if ours is None:
            raise ModelError(f"{location}: adapts {module!r}, which this model does not have; check `model`.")
        theirs = read.modules.setdefault(ours, [])
        theirs += [module] if module not in theirs else []
        table = {**LINEAR, **EMBEDDING, _OLD_MAGNITUDE: "m"}
        key = f"{ours}.{table[leaf]}"
        if number is not None:
            experts.setdefault(key, {})[number] = array
        # A magnitude is a vector, whatever axes of length 1 were kept around it. Matrices are laid out as they would be
        # read from a file of mlx-lm's: products of a transposed view are rounded otherwise.
        else:
            read.weights[key] = array.reshape(-1) if table[leaf] == "m" else mx.contiguous(array.T)
    return read._replace(weights={**read.weights, **_stacks(experts, model, location)})


def _stacks(experts: Mapping[str, Mapping[int, mx.array]], model: nn.Module, location: str) -> dict[str, mx.array]:
    """The matrices of all experts of a layer in one array; ModelError where one is missing or of another shape."""
    modules = dict(model.named_modules())
    stacks = {}
    for key, own in experts.items():
        module = modules[key.rpartition(".")[0]]
        count = (module["linear"] if "lora_a" in module else module).num_experts
        if sorted(own) != list(range(count)) or len({(array.shape, array.dtype) for array in own.values()}) > 1:
            raise ModelError(
                f"{location}: {key!r} is of {count} experts, and the file has matrices of {len(own)}, or of several "
                "shapes; mlx-lm's adapters are on all experts of a layer alike."
            )
        stacks[key] = mx.stack([own[number] for number in range(count)])
    return stacks


def stack_of(theirs: str) -> tuple[str, int | None]:
    """mlx-lm's name for the stack that an expert's module belongs to, and its number; other modules as they are."""
    found = re.fullmatch(r"(.+)\.experts\.(\d+)\.(\w+)", theirs)
    if not found:
        return theirs, None
    projections = {number: projection for projection, number in BY_NUMBER.items()}
    return f"{found[1]}{STACKED}{projections.get(found[3], found[3])}", int(found[2])


def expert_names(stack: str, experts: int) -> list[list[str]]:
    """What checkpoints may call a stack's experts, as most do and as Mixtral's; nothing for other modules."""
    layer, stacked, projection = stack.partition(STACKED)
    called = [projection, BY_NUMBER.get(projection, projection)] if stacked else []
    return [[f"{layer}.experts.{number}.{name}" for number in range(experts)] for name in called]


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
