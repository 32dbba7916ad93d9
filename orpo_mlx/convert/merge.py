"""A model and its adapter as one model, under the names the checkpoint had, so that transformers finds them too."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import dequantize_model

from orpo_mlx.convert.checkpoint_places import put_back
from orpo_mlx.errors import ModelError, reason_of
from orpo_mlx.files import read_json_table
from orpo_mlx.models.peft_names import STACKED
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE, ADAPTERS_FILE

# Layers whose weights are packed; experts in one array are a class of mlx-lm's own.
_QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


def is_quantised(model: nn.Module) -> bool:
    """Whether any layer is."""
    return any(isinstance(module, _QUANTISED) for _, module in model.named_modules())


def fuse(model: nn.Module, dtype: mx.Dtype | None, location: str) -> dict[str, mx.array]:
    """Merge the adapters into `model`, everything in floating point afterwards; computed in float32, rounded once.

    Args:
        model: a model with adapters.
        dtype: what the weights are to be in; None for what they were in.
        location: the adapters' folder, for errors.

    Returns:
        Weight name to the base model's weight before, in float32, for each layer that had an adapter.

    Raises:
        ModelError: mlx-lm cannot merge or dequantise one of the layers.
    """
    kept = {
        name: array.dtype
        for name, array in dict(tree_flatten(model.parameters())).items()
        if mx.issubdtype(array.dtype, mx.floating)
    }
    # In half precision the product of the two matrices would be rounded, and its sum with the weight once more.
    model.set_dtype(mx.float32)
    adapted = [(name, module) for name, module in model.named_modules() if hasattr(module, "fuse")]
    base = {f"{name}.weight": (module.get("linear") or module["embedding"]).weight for name, module in adapted}
    try:
        model.update_modules(tree_unflatten([(name, module.fuse(dequantize=True)) for name, module in adapted]))
        dequantize_model(model)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{location}: mlx-lm cannot merge into this quantised model ({reason_of(error)}).") from None

    def rounded(name: str, array: mx.array) -> mx.array:
        # A merged layer's arrays were under `linear` or `embedding`; a dequantised one's dtype was that of its scales.
        stem, _, last = name.rpartition(".")
        places = [f"{stem}.{inner}" for inner in ("linear", "embedding")]
        lasts = (last, "scales") if last == "weight" else (last,)
        own = (kept.get(f"{place}.{each}".lstrip(".")) for each in lasts for place in (stem, *places))
        found = next((each for each in (dtype, *own) if each is not None), mx.bfloat16)
        return array.astype(found) if mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(rounded, model.parameters()))
    return base


def merged_tensors(
    tensors: dict[str, mx.array], model: nn.Module, base: dict[str, mx.array], location: str
) -> dict[str, mx.array]:
    """`tensors` of a checkpoint with the weights in `base` exchanged for the merged model's.

    Raises:
        ModelError: one of them is not in the checkpoint as the model has it.
    """
    merged = dict(tree_flatten(model.parameters()))
    # Whatever the model does not hold stays: other heads, vision towers, buffers.
    result = dict(tensors)
    for name, before in base.items():
        if not put_back(result, name, before, merged[name]):
            raise ModelError(
                f"{location}: {name} has no counterpart in the checkpoint that it could be merged into; train on other "
                "layers, or give `quantize`, which writes mlx-lm's own layout."
            )
    # A head that is the embedding, stored a second time: left as it was, it would be a head of its own from now on.
    if not any("lm_head" in name for name in merged):
        replaced = {name: before for name, before in base.items() if "embed" in name}
        for name in [name for name in result if name.endswith("lm_head.weight")]:
            if any(_equal(result[name], before) for before in replaced.values()):
                del result[name]
    return result


def _equal(one: mx.array, other: mx.array) -> bool:
    return one.shape == other.shape and bool(mx.array_equal(one.astype(mx.float32), other.astype(mx.float32)).item())


def model_tensors(model: nn.Module, location: str) -> dict[str, mx.array]:
    """All weights of a model under mlx-lm's names, where those are Hugging Face's.

    Raises:
        ModelError: they are not.
    """
    weights = dict(tree_flatten(model.parameters()))
    stacked = next((name for name in weights if STACKED in name), None)
    if stacked is not None:
        raise ModelError(
            f"{location}: {stacked} holds all experts of a layer, which is mlx-lm's layout and not Hugging Face's; "
            "merge into the unquantised Hugging Face checkpoint, or give `quantize`."
        )
    return weights


def full_weights(model: nn.Module, adapter: Path) -> dict[str, mx.array]:
    """The base model's weights that a full fine-tuning in `adapter` replaced; empty for LoRA and DoRA.

    Call it before the adapter is loaded.
    """
    if read_json_table(adapter / ADAPTER_CONFIG_FILE, ModelError).get("fine_tune_type") != "full":
        return {}
    trained = mx.load(str(adapter / ADAPTERS_FILE))
    assert isinstance(trained, dict)
    own = dict(tree_flatten(model.parameters()))
    return {name: own[name] for name in trained if name in own}
