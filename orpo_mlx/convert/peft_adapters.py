"""PEFT's adapters as mlx-lm's, and back, without a bit changed.

The same matrices under other names, transposed: PEFT's A (r, in) and B (out, r) are mlx-lm's lora_a (in, r) and lora_b
(r, out). What one side's settings cannot say is carried where the other side does not look: PEFT's whole config under
`peft` in mlx-lm's adapter_config.json, mlx-lm's in the header of PEFT's safetensors file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from orpo_mlx.convert.write_model import write_json
from orpo_mlx.errors import ModelError
from orpo_mlx.files import save_safetensors
from orpo_mlx.models.peft_adapters import (
    CARRIED,
    Adapter,
    check_fits,
    check_layers,
    is_embedding,
    is_stack,
    mlx_scaling,
)
from orpo_mlx.models.peft_config import Scaling, find_targets, make_peft_config, matches, read_scaling, same_scaling
from orpo_mlx.models.peft_names import (
    EMBEDDING,
    LINEAR,
    PREFIX,
    base_weight,
    expert_names,
    our_module,
    split_name,
    stored_names,
    their_module,
)
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE

_NO_EXPERTS = (
    "experts that the checkpoint holds in one tensor: LoRA on these (target_parameters) is one thing in PEFT 0.18 and "
    "another since 0.19, and no file says which it is of; use merge"
)


def write_adapter(folder: Path, weights_file: str, adapter: Adapter) -> int:
    """Write an adapter folder; the bytes of its weights."""
    save_safetensors(folder / weights_file, adapter.weights, adapter.metadata)
    write_json(folder / ADAPTER_CONFIG_FILE, adapter.config)
    return sum(array.nbytes for array in adapter.weights.values())


def mlx_to_peft(
    adapter: Adapter, model: nn.Module, settings: Mapping[str, Any], names: set[str], base: str, location: str
) -> Adapter:
    """PEFT's form of one of mlx-lm's adapters for `model`.

    Args:
        adapter: mlx-lm's form.
        model: the base model, without adapters; it has them afterwards, at their starting values.
        settings: the base model's config.json, by which transformers names its modules.
        names: the checkpoint's own tensor names.
        base: the base model's name, for PEFT's config.
        location: the folder, for errors.

    Raises:
        ModelError: it is for another model, or is something PEFT cannot express.
    """
    modules = dict(model.named_modules())
    scaling = mlx_scaling(adapter.config, f"{location}/{ADAPTER_CONFIG_FILE}")
    adapted = {name.rpartition(".")[0] for name in adapter.weights}
    check_layers(adapted, modules, scaling, location)
    stored = {name: _stored_as(name, names) for name in modules}
    carried = adapter.config.get("peft")
    given = carried.get("names", {}) if isinstance(carried, dict) else {}
    theirs = {name: given.get(name) or their_module(name, settings) for name in modules}
    targets: dict[str, list[str]] = {}
    for module in sorted(adapted):
        stack = is_stack(modules[module])
        whole = [theirs[module]] if stored[module] else []
        targets[module] = _experts_as(module, modules[module], theirs, names) if stack else whole
        if not targets[module]:
            why = _NO_EXPERTS if stack else "which the checkpoint has under no such name for PEFT to find"
            raise ModelError(f"{location}: adapts {module!r}, {why}.")
    # Before adapters are put on it: the weights that PEFT wrote of the base model go back with them.
    unchanged = {name: _base_of(model, name, location) for name in (carried or {}).get("base_layers", ())}
    check_fits(adapter, model, location)
    weights: dict[str, mx.array] = {}
    for name, array in adapter.weights.items():
        module, _, leaf = name.rpartition(".")
        table = EMBEDDING if is_embedding(modules[module]) else LINEAR
        leaf_name = next(key for key, value in table.items() if value == leaf)
        # Of a stack each expert's part, which is the way round that PEFT has; of others all, transposed.
        parts = list(array) if array.ndim == 3 else [array if leaf == "m" else array.T]
        weights |= {f"{PREFIX}{target}.{leaf_name}": part for target, part in zip(targets[module], parts, strict=True)}
    in_peft = set(itertools.chain(*targets.values()))
    if carried is None:
        read = {name for name in stored.values() if name is not None}
        # Of other senses, layers and what they are inside of: PEFT would find these by a shared ending, too.
        unread = {part for name in names if (stem := name.rpartition(".")[0]) not in read for part in _outer(stem)}
        leaves = [theirs[name] for name in modules if stored[name]] + sorted(unread - read)
        config = make_peft_config(scaling, find_targets(in_peft, leaves), base)
        metadata = {CARRIED: json.dumps(adapter.config)}
    else:
        config = carried_peft_config(carried, scaling, in_peft, location)
        metadata = {}
        weights |= unchanged
    return Adapter(config, weights, {"format": "pt", **adapter.metadata, **metadata})


def _experts_as(ours: str, module: Any, theirs: Mapping[str, str], names: set[str]) -> list[str]:
    """What PEFT calls the experts of a stack, as a checkpoint has them one by one; none where it does not."""
    called = expert_names(theirs[ours], module.num_experts)
    for stored in stored_names(ours):
        for found, wanted in zip(expert_names(stored, module.num_experts), called, strict=True):
            if all(f"{each}.weight" in names for each in found):
                return wanted
    return []


def _outer(name: str) -> list[str]:
    """A module and all that it is inside of."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _stored_as(module: str, names: set[str]) -> str | None:
    """The name under which a checkpoint has a module of mlx-lm's."""
    return next((name for name in stored_names(module) if f"{name}.weight" in names), None)


def _base_of(model: nn.Module, name: str, location: str) -> mx.array:
    """The base model's weight that PEFT wrote under `name`."""
    module, leaf = split_name(name, location)
    ours = our_module(module, {each for each, _ in model.named_modules()})
    own = base_weight(model, ours or module, leaf.rpartition(".")[2])
    if own is None:
        raise ModelError(f"{location}: {name} is of no weight that this model has; check `model`.")
    return own


def carried_peft_config(carried: Any, scaling: Scaling, adapted: set[str], location: str) -> dict[str, Any]:
    """The PEFT config an adapter came with, as long as it still says the same."""
    try:
        config = dict(carried["config"])
        same = same_scaling(read_scaling(config, location, adapted), scaling)
        named = config["target_modules"] == "all-linear" or all(matches(config, name) for name in adapted)
    except (KeyError, TypeError, ValueError):
        same = named = False
    if not same or not named:
        raise ModelError(
            f"{location}/{ADAPTER_CONFIG_FILE}: its `peft` part, which it was converted from, and its "
            "lora_parameters disagree; remove that part to write a new PEFT config."
        )
    return config
