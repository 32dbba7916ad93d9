"""A model's architecture without its weights: from config.json and safetensors headers, or a GGUF file's metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from math import lcm, prod
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_config

from orpo_mlx.errors import ModelError, reason_of
from orpo_mlx.models.gguf.loading import gguf_config
from orpo_mlx.models.loading import LOADING_ERRORS, loaded_dtype, locate
from orpo_mlx.models.stored.hf_config import normalise_config
from orpo_mlx.models.stored.model_classes import model_classes
from orpo_mlx.models.stored.safetensors_files import read_header
from orpo_mlx.models.stored.tied_head import settle_tie

# What configs call the number of layers, and after how many their pattern repeats.
_LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_PERIOD_KEYS = ("sliding_window_pattern", "full_attention_interval")
# How many layers at the end take their keys and values from earlier ones.
_SHARING_KEY = "num_kv_shared_layers"
# A prime number, so that rows of weights differ.
_DRAWN = 1_048_573
_HEADER_DTYPES = {"F64": mx.float32, "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


class Blueprint(NamedTuple):
    """What is needed to build a model of the same shape."""

    config: dict[str, Any]
    layers: int
    period: int
    """Layers come in a pattern that repeats after so many."""
    dtype: mx.Dtype
    """Of floating-point weights once loaded."""
    quantised: frozenset[str]
    """Names of the modules whose weights are quantised."""
    tensors: frozenset[str] = frozenset()
    """Names of the tensors in the safetensors files; none where it is another kind of file."""


class Stored(NamedTuple):
    """What safetensors headers say of a model."""

    dtype: mx.Dtype
    """That of most floating-point numbers."""
    quantised: frozenset[str]
    """Names of the modules that have scales."""
    tensors: frozenset[str]


def read_blueprint(name: str, *, dtype: str | None = None) -> Blueprint:
    """The blueprint of a model by the names that `models.loading.load` takes; `dtype` as there. No weight is read.

    Raises:
        ModelError: it cannot be found or read, or its config does not say how many layers it has.
    """
    path, _ = locate(name)
    if path.is_file():
        config, file_dtype = gguf_config(path)
        stored = Stored(file_dtype, frozenset(), frozenset())
    else:
        config = _folder_config(path)
        stored = _read_headers(path)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and "quantization" not in config and not stored.quantised:
        raise ModelError(
            f"{name}: is quantised as {method}, whose size in memory only loading it shows; convert it to mlx-lm's own "
            "form (orpo-mlx convert hf with `quantize`), or go by the size of its files."
        )
    layers = _layer_count(path, config)
    stored = stored._replace(dtype=loaded_dtype(dtype) or stored.dtype)
    return Blueprint(config, layers, layer_period(config, layers), *stored)


def four_bit_blueprint(config: Mapping[str, Any]) -> Blueprint:
    """That of a checkpoint in bfloat16 whose matrices are quantised to 4 bits in groups of 64, as mlx-lm's are.

    Raises:
        ModelError: mlx-lm has no such architecture.
    """
    table = {**config, "quantization": {"group_size": 64, "bits": 4}}
    layers = _layer_count(Path("config.json"), table)
    plain = Blueprint(table, layers, layer_period(table, layers), mx.bfloat16, frozenset())
    names = [name for name, module in build(plain, layers).named_modules() if hasattr(module, "to_quantized")]
    return plain._replace(quantised=frozenset(names))


def build(blueprint: Blueprint, layers: int) -> nn.Module:
    """The model with that many of its layers, frozen, with weights that are not computed until somebody asks.

    Raises:
        ModelError: mlx-lm has no such architecture.
    """
    config = with_layers(blueprint.config, blueprint.layers, layers)
    try:
        model_class, args_class = model_classes(config)
        model: nn.Module = model_class(args_class.from_dict(config))
    except LOADING_ERRORS as error:
        raise ModelError(f"config.json: mlx-lm cannot build this model ({reason_of(error)}).") from None
    leave_out_head(model, blueprint.tensors)
    # As mlx-lm's loader does it: a layer is quantised if it has scales, in the way the config has for it.
    table = config.get("quantization") or {}
    if blueprint.quantised:

        def choose(name: str, module: nn.Module) -> Any:
            return table.get(name, name in blueprint.quantised and hasattr(module, "to_quantized"))

        given = {key: table[key] for key in ("group_size", "bits", "mode") if key in table}
        nn.quantize(model, class_predicate=choose, **given)
    # After quantisation, as in a loaded model: scales are of that dtype too, packed weights are integers and stay.
    model.set_dtype(blueprint.dtype)
    repeat_random_numbers(model)
    model.freeze()
    model.eval()
    return model


def repeat_random_numbers(model: nn.Module) -> None:
    """Give large weights the same million numbers again and again: to draw or to quantise all takes a CPU seconds."""
    parameters = dict(tree_flatten(model.parameters()))
    large = {name: array for name, array in parameters.items() if array.size > _DRAWN and array.ndim > 1}
    if not large:
        return
    drawn = mx.random.normal((_DRAWN,))
    for name, array in large.items():
        # What a product sums stays of the size of its input; of packed integers any will do.
        numbers = mx.abs(drawn * 2**30) if array.dtype == mx.uint32 else drawn / array.shape[-1] ** 0.5
        numbers = numbers.astype(array.dtype)
        whole, rest = divmod(array.size, _DRAWN)
        flat = mx.concatenate([mx.broadcast_to(numbers, (whole, _DRAWN)).flatten(), numbers[:rest]])
        model.update(tree_unflatten([(name, flat.reshape(array.shape))]))


def leave_out_head(model: nn.Module, tensors: frozenset[str]) -> None:
    """Leave out a head that the checkpoint has not: some of mlx-lm's classes find that out when weights are loaded."""
    own = next((name for name in dict(tree_flatten(model.parameters())) if name.endswith("lm_head.weight")), None)
    if own is None or not tensors or any(name.endswith("lm_head.weight") for name in tensors):
        return
    # Gemma 3's class removes its own head in `sanitize`, which is given every name with nothing behind it. Other
    # classes need the arrays themselves, and have no such head to leave out.
    with suppress(AttributeError, KeyError, ValueError, TypeError, IndexError):
        model.sanitize({name: mx.zeros(()) for name in tensors})


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters; computes none."""
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())


def _folder_config(path: Path) -> dict[str, Any]:
    """The config.json of a model folder, normalised."""
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json in this folder, so it is not a model.")
    try:
        return settle_tie(normalise_config(load_config(path), str(path / "config.json")), path)
    except LOADING_ERRORS as error:
        raise ModelError(f"{path}/config.json: cannot be read ({reason_of(error)}).") from None


def _read_headers(path: Path) -> Stored:
    """The headers of all weight files of a folder."""
    sizes: Counter[str] = Counter()
    quantised = set()
    names = set()
    for file in sorted(path.glob("model*.safetensors")):
        for name, tensor in read_header(file).tensors.items():
            names.add(name)
            if tensor.dtype in _HEADER_DTYPES:
                sizes[tensor.dtype] += prod(tensor.shape)
            if name.endswith(".scales"):
                quantised.add(name.removesuffix(".scales"))
    if not sizes:
        raise ModelError(f"{path}: no model*.safetensors with floating-point weights in this folder.")
    return Stored(_HEADER_DTYPES[sizes.most_common(1)[0][0]], frozenset(quantised), frozenset(names))


def _layer_count(path: Path, config: Mapping[str, Any]) -> int:
    """How many layers a config says there are."""
    # Multimodal configs have it in the inner table.
    for table in (config, config.get("text_config") or {}):
        for key in _LAYER_KEYS:
            if isinstance(table.get(key), int):
                return int(table[key])
    raise ModelError(f"{path}: its config does not say how many layers it has (one of {', '.join(_LAYER_KEYS)}).")


def layer_period(config: Mapping[str, Any], layers: int) -> int:
    """After how many layers the pattern of layers repeats, 1 where all are alike: from lists with an entry for each.

    Twice that where the last layers take keys and values from earlier ones, so that there are earlier ones.
    """
    periods = [1]
    for key, value in config.items():
        if key in _PERIOD_KEYS and isinstance(value, int):
            periods.append(value)
        elif key == "text_config":
            periods.append(layer_period(value, layers))
        # A list with an entry for each layer (kinds of attention, sizes): whatever it is called, it has the layers'
        # pattern.
        elif isinstance(value, list) and len(value) == layers:
            periods.append(next(size for size in range(1, layers + 1) if value[size:] == value[: layers - size]))
    return min(lcm(*periods) * (2 if config.get(_SHARING_KEY) else 1), layers)


def with_layers(config: Mapping[str, Any], total: int, layers: int) -> dict[str, Any]:
    """`config` with another number of layers; lists with an entry for each layer are cut to it, and layers that share
    keys and values keep their part of the whole, up to a half."""
    changed = dict(config)
    for key, value in config.items():
        if key in _LAYER_KEYS:
            changed[key] = layers
        elif isinstance(value, list) and len(value) == total:
            changed[key] = value[:layers]
        elif key == _SHARING_KEY and layers < total:
            changed[key] = min(round(value * layers / total), layers // 2)
        elif key == "text_config":
            changed[key] = with_layers(value, total, layers)
    return changed
