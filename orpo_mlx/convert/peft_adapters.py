"""PEFT's adapters as mlx-lm's, and back, without a bit changed.

The same matrices under other names, transposed: PEFT's A (r, in) and B (out, r) are mlx-lm's lora_a (in, r) and lora_b
(r, out). What one side's settings cannot say is carried where the other side does not look: PEFT's whole config under
`peft` in mlx-lm's adapter_config.json, mlx-lm's in the header of PEFT's safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.utils import linear_to_lora_layers

from orpo_mlx.convert.write_model import write_json
from orpo_mlx.errors import ModelError
from orpo_mlx.files import read_json_table, save_safetensors
from orpo_mlx.models.peft_config import (
    Scaling,
    find_targets,
    make_peft_config,
    matches,
    read_scaling,
    refuse_inexpressible,
    same_scaling,
)
from orpo_mlx.models.peft_names import (
    EMBEDDING,
    LINEAR,
    PREFIX,
    base_weight,
    our_module,
    read_peft_tensors,
    split_name,
    stored_names,
    their_module,
)
from orpo_mlx.models.stored.safetensors_files import read_header

CONFIG = "adapter_config.json"
MLX_WEIGHTS = "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
# Where mlx-lm's config is carried in the header of PEFT's file.
_CARRIED = "orpo_mlx.adapter_config"
_LEAVES = ("lora_a", "lora_b", "m")


class Adapter(NamedTuple):
    """An adapter in either form."""

    config: dict[str, Any]
    weights: dict[str, mx.array]
    metadata: dict[str, str]
    """Of the safetensors header."""


def read_adapter(folder: Path, weights_file: str, *, source: str) -> Adapter:
    """An adapter folder, checked.

    Raises:
        ModelError: a file is missing or damaged.
    """
    if not (folder / CONFIG).is_file() or not (folder / weights_file).is_file():
        raise ModelError(f"{source} {folder}: is no adapter folder, which has {CONFIG} and {weights_file}.")
    config = read_json_table(folder / CONFIG, ModelError)
    header = read_header(folder / weights_file)
    weights = mx.load(str(folder / weights_file), format="safetensors")
    assert isinstance(weights, dict)
    if not weights:
        raise ModelError(f"{folder / weights_file}: holds no tensors.")
    return Adapter(config, weights, header.metadata)


def write_adapter(folder: Path, weights_file: str, adapter: Adapter) -> int:
    """Write an adapter folder; the bytes of its weights."""
    save_safetensors(folder / weights_file, adapter.weights, adapter.metadata)
    write_json(folder / CONFIG, adapter.config)
    return sum(array.nbytes for array in adapter.weights.values())


def peft_to_mlx(peft: Adapter, model: nn.Module, settings: Mapping[str, Any], location: str) -> Adapter:
    """mlx-lm's form of a PEFT adapter for `model`.

    Args:
        peft: PEFT's form.
        model: the base model, without adapters; it has them afterwards, at their starting values.
        settings: the base model's config.json.
        location: the folder, for errors.

    Raises:
        ModelError: it is for another model, or says something mlx-lm's adapters cannot express.
    """
    refuse_inexpressible(peft.config, f"{location}/{CONFIG}")
    read = read_peft_tensors(peft.weights, model, location)
    scaling = read_scaling(peft.config, f"{location}/{CONFIG}", read.modules.values())
    adapted = set(read.modules)
    _check_layers(adapted, dict(model.named_modules()), scaling, location)
    # An adapter that came from mlx-lm gets its own config back, which has keys that PEFT's cannot say.
    carried = peft.metadata.get(_CARRIED)
    if carried is None:
        lora = {"rank": scaling.rank, "scale": scaling.scale, "dropout": scaling.dropout}
        kept: dict[str, Any] = {"config": peft.config, "base_layers": read.unchanged}
        # Adapters of an earlier transformers have other names of modules, and get them back.
        named = {ours: theirs for ours, theirs in read.modules.items() if theirs != their_module(ours, settings)}
        config = {
            "fine_tune_type": "dora" if scaling.dora else "lora",
            **layers_and_keys(adapted, model, lora),
            "peft": {**kept, "names": named} if named else kept,
        }
    else:
        config = carried_mlx_config(carried, scaling, location)
    result = Adapter(config, read.weights, {key: value for key, value in peft.metadata.items() if key != _CARRIED})
    check_fits(result, model, location)
    return result


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
    scaling = _mlx_scaling(adapter.config, f"{location}/{CONFIG}")
    adapted = {name.rpartition(".")[0] for name in adapter.weights}
    _check_layers(adapted, modules, scaling, location)
    stored = {name: _stored_as(name, names) for name in modules}
    for module in sorted(adapted):
        if stored[module] is None:
            raise ModelError(
                f"{location}: adapts {module!r}, which the checkpoint has under no such name for PEFT to find."
            )
    carried = adapter.config.get("peft")
    given = carried.get("names", {}) if isinstance(carried, dict) else {}
    theirs = {name: given.get(name) or their_module(name, settings) for name in modules}
    # Before adapters are put on it: the weights that PEFT wrote of the base model go back with them.
    unchanged = {name: _base_of(model, name, location) for name in (carried or {}).get("base_layers", ())}
    check_fits(adapter, model, location)
    weights = {}
    for name, array in adapter.weights.items():
        module, _, leaf = name.rpartition(".")
        table = EMBEDDING if is_embedding(modules[module]) else LINEAR
        leaf_name = next(key for key, value in table.items() if value == leaf)
        weights[f"{PREFIX}{theirs[module]}.{leaf_name}"] = array if leaf == "m" else array.T
    in_peft = {theirs[name] for name in adapted}
    if carried is None:
        read = {name for name in stored.values() if name is not None}
        # Of other senses, layers and what they are inside of: PEFT would find these by a shared ending, too.
        unread = {part for name in names if (stem := name.rpartition(".")[0]) not in read for part in _outer(stem)}
        leaves = [theirs[name] for name in modules if stored[name]] + sorted(unread - read)
        targets = find_targets(in_peft, list(theirs.values()), leaves)
        config = make_peft_config(scaling, targets, base)
        metadata = {_CARRIED: json.dumps(adapter.config)}
    else:
        config = carried_peft_config(carried, scaling, in_peft, location)
        metadata = {}
        weights |= unchanged
    return Adapter(config, weights, {"format": "pt", **adapter.metadata, **metadata})


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


def check_fits(adapter: Adapter, model: nn.Module, location: str) -> None:
    """Put adapters on `model` as mlx-lm does and make sure that these weights are exactly theirs, in name and shape.

    Raises:
        ModelError: they are not.
    """
    try:
        linear_to_lora_layers(
            model,
            adapter.config["num_layers"],
            dict(adapter.config["lora_parameters"]),
            use_dora=adapter.config.get("fine_tune_type") == "dora",
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{location}: mlx-lm cannot put these adapters on the model ({error}).") from None
    expected = {
        f"{name}.{leaf}": module[leaf].shape
        for name, module in model.named_modules()
        if "lora_a" in module
        for leaf in _LEAVES
        if leaf in module
    }
    for name in sorted({*expected, *adapter.weights}):
        found = adapter.weights[name].shape if name in adapter.weights else None
        if name not in expected or found != expected[name]:
            wanted = f"shape {expected[name]}" if name in expected else "nothing of this name"
            raise ModelError(
                f"{location}: {name} {'is missing' if found is None else f'has shape {found}'}, the model with these "
                f"settings has {wanted}; check `model`."
            )


def _check_layers(adapted: set[str], modules: Mapping[str, nn.Module], scaling: Scaling, location: str) -> None:
    """Make sure that both forms can adapt these modules, and mean the same by it."""
    for name in sorted(adapted):
        module = modules.get(name)
        if module is None:
            raise ModelError(f"{location}: adapts {name!r}, which this model does not have; check `model`.")
        if is_embedding(module):
            # Without a head of its own the embedding's weights are used twice.
            if not any(other.rpartition(".")[2] == "lm_head" for other in modules):
                raise ModelError(
                    f"{location}: adapts {name!r}, which this model also uses as its head: mlx-lm adapts both uses and "
                    "PEFT only one, so neither can express the other's."
                )
            if scaling.dora:
                raise ModelError(f"{location}: DoRA on the embedding {name!r} is not the same in PEFT and mlx-lm.")
        elif not isinstance(module, nn.Linear | nn.QuantizedLinear):
            kind = type(module).__name__
            raise ModelError(f"{location}: {name!r} is a {kind} here, and only linear and embedding layers convert.")


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.QuantizedEmbedding)


def carried_mlx_config(carried: str, scaling: Scaling, location: str) -> dict[str, Any]:
    """The config of mlx-lm's that an adapter came with, as long as PEFT's still says the same."""
    try:
        config = dict(json.loads(carried))
        same = same_scaling(_mlx_scaling(config, location), scaling)
    except (ValueError, TypeError):
        same = False
    if not same:
        raise ModelError(
            f"{location}/{CONFIG}: r, lora_alpha or another setting was changed since it was converted, so it and the "
            "header of its safetensors file disagree; put them back."
        )
    return config


def layers_and_keys(adapted: set[str], model: nn.Module, lora: Mapping[str, Any]) -> dict[str, Any]:
    """`num_layers` and `lora_parameters` with the `keys` that make mlx-lm adapt exactly the modules in `adapted`."""
    blocks = {id(block): index for index, block in enumerate(model.layers)}
    prefixes = {f"{name}.": blocks[id(module)] for name, module in model.named_modules() if id(module) in blocks}
    inner: dict[int, set[str]] = {index: set() for index in prefixes.values()}
    outside = set()
    for name in adapted:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            outside.add(name)
        else:
            inner[prefixes[prefix]].add(name[len(prefix) :])
    used = [index for index, names in inner.items() if names]
    alike = bool(used) and all(inner[index] == inner[used[-1]] for index in used)
    # Every block from some one on, all alike: what mlx-lm says in a number and names within a block.
    if alike and sorted(used) == list(range(min(used), len(model.layers))):
        keys = {*inner[used[-1]], *outside}
        layers = len(used)
    else:
        # Full names are matched in the whole model.
        keys = adapted
        layers = len(model.layers)
    return {"num_layers": layers, "lora_parameters": {**lora, "keys": sorted(keys)}}


def _mlx_scaling(config: Mapping[str, Any], location: str) -> Scaling:
    """The numbers of mlx-lm's adapter config."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ModelError(f"{location}: fine_tune_type is {kind!r}: these are whole weights, not an adapter; use merge.")
    lora = config.get("lora_parameters")
    try:
        rank: Any = lora["rank"]  # type: ignore[index]
        scale: Any = lora["scale"]  # type: ignore[index]
        dropout: Any = lora.get("dropout", 0.0)  # type: ignore[union-attr]
        # Not isinstance, which takes true for the number 1.
        if type(rank) is int and rank > 0 and isinstance(config["num_layers"], int):
            return Scaling(rank, float(scale), float(dropout), kind == "dora")
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise ModelError(f"{location}: is no adapter config of mlx-lm (num_layers, lora_parameters with rank and scale).")


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
            f"{location}/{CONFIG}: its `peft` part, which it was converted from, and its lora_parameters disagree; "
            "remove that part to write a new PEFT config."
        )
    return config
