"""An adapter in PEFT's form as mlx-lm's: what the two can both say, exactly, and the rest refused by name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from orpo_mlx.errors import ModelError
from orpo_mlx.files import read_json_table
from orpo_mlx.models.peft_config import Scaling, read_scaling, refuse_inexpressible, same_scaling
from orpo_mlx.models.peft_names import STACKED, read_peft_tensors, their_module
from orpo_mlx.models.stored.safetensors_files import read_header
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE

CARRIED = "orpo_mlx.adapter_config"
"""Where mlx-lm's config is carried in the header of PEFT's file."""
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
    if not (folder / ADAPTER_CONFIG_FILE).is_file() or not (folder / weights_file).is_file():
        raise ModelError(
            f"{source} {folder}: is no adapter folder, which has {ADAPTER_CONFIG_FILE} and {weights_file}."
        )
    config = read_json_table(folder / ADAPTER_CONFIG_FILE, ModelError)
    header = read_header(folder / weights_file)
    weights = mx.load(str(folder / weights_file), format="safetensors")
    assert isinstance(weights, dict)
    if not weights:
        raise ModelError(f"{folder / weights_file}: holds no tensors.")
    return Adapter(config, weights, header.metadata)


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
    refuse_inexpressible(peft.config, f"{location}/{ADAPTER_CONFIG_FILE}")
    read = read_peft_tensors(peft.weights, model, location)
    scaling = read_scaling(peft.config, f"{location}/{ADAPTER_CONFIG_FILE}", itertools.chain(*read.modules.values()))
    adapted = set(read.modules)
    check_layers(adapted, dict(model.named_modules()), scaling, location)
    # An adapter that came from mlx-lm gets its own config back, which has keys that PEFT's cannot say.
    carried = peft.metadata.get(CARRIED)
    if carried is None:
        lora = {"rank": scaling.rank, "scale": scaling.scale, "dropout": scaling.dropout}
        kept: dict[str, Any] = {"config": peft.config, "base_layers": read.unchanged}
        # Adapters of an earlier transformers have other names of modules, and get them back; experts the checkpoint's.
        alone = {ours: theirs[0] for ours, theirs in read.modules.items() if STACKED not in ours}
        named = {ours: theirs for ours, theirs in alone.items() if theirs != their_module(ours, settings)}
        config = {
            "fine_tune_type": "dora" if scaling.dora else "lora",
            **layers_and_keys(adapted, model, lora),
            "peft": {**kept, "names": named} if named else kept,
        }
    else:
        config = carried_mlx_config(carried, scaling, location)
    result = Adapter(config, read.weights, {key: value for key, value in peft.metadata.items() if key != CARRIED})
    check_fits(result, model, location)
    return result


def check_rank(config: Mapping[str, Any], shapes: Iterable[Sequence[int]], location: str) -> None:
    """Refuse a rank beyond what weights of these shapes can have: MLX would end the process over it.

    Raises:
        ModelError: it is.
    """
    parameters = config.get("lora_parameters")
    rank = parameters.get("rank") if isinstance(parameters, Mapping) else None
    largest = max(itertools.chain.from_iterable(shapes), default=0)
    if isinstance(rank, int) and rank > largest and config.get("fine_tune_type") != "full":
        raise ModelError(
            f"{location}: adapter_config.json has lora_parameters.rank {rank}, and no side of these weights is longer "
            f"than {largest}; give adapters whose config and weights are of one training."
        )


def check_fits(adapter: Adapter, model: nn.Module, location: str) -> None:
    """Put adapters on `model` as mlx-lm does and make sure that these weights are exactly theirs, in name and shape.

    Raises:
        ModelError: they are not.
    """
    check_rank(adapter.config, (weight.shape for weight in adapter.weights.values()), location)
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


def check_layers(adapted: set[str], modules: Mapping[str, nn.Module], scaling: Scaling, location: str) -> None:
    """Make sure that both forms can adapt these modules, and mean the same by it; adapters may be on them already."""
    for name in sorted(adapted):
        if name not in modules:
            raise ModelError(f"{location}: adapts {name!r}, which this model does not have; check `model`.")
        module = unwrapped(modules[name])
        if is_embedding(module):
            # Without a head of its own the embedding's weights are used twice.
            if not any(other.rpartition(".")[2] == "lm_head" for other in modules):
                raise ModelError(
                    f"{location}: adapts {name!r}, which this model also uses as its head: mlx-lm adapts both uses and "
                    "PEFT only one, so neither can express the other's."
                )
            if scaling.dora:
                raise ModelError(f"{location}: DoRA on the embedding {name!r} is not the same in PEFT and mlx-lm.")
        elif not is_stack(module) and not isinstance(module, nn.Linear | nn.QuantizedLinear):
            kind = type(module).__name__
            raise ModelError(f"{location}: {name!r} is a {kind} here; linear layers, experts and embeddings convert.")


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer that an adapter is wrapped around; the module itself where it has none."""
    if "lora_a" not in module:
        return module
    inner: nn.Module = module["linear"] if "linear" in module else module["embedding"]
    return inner


def is_stack(module: nn.Module) -> bool:
    """Whether it is the experts of a layer in one array."""
    return isinstance(module, SwitchLinear | QuantizedSwitchLinear)


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.QuantizedEmbedding)


def carried_mlx_config(carried: str, scaling: Scaling, location: str) -> dict[str, Any]:
    """The config of mlx-lm's that an adapter came with, as long as PEFT's still says the same."""
    try:
        config = dict(json.loads(carried))
        same = same_scaling(mlx_scaling(config, location), scaling)
    except (ValueError, TypeError):
        same = False
    if not same:
        raise ModelError(
            f"{location}/{ADAPTER_CONFIG_FILE}: r, lora_alpha or another setting was changed since it was converted, "
            "so it and the header of its safetensors file disagree; put them back."
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


def mlx_scaling(config: Mapping[str, Any], location: str) -> Scaling:
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
