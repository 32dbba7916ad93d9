"""Read a GGUF file into an mlx-lm model and tokenizer, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from orpo_mlx.errors import ModelError, reason_of
from orpo_mlx.models.gguf.architectures import architecture_of, hf_name, is_weight, read_config
from orpo_mlx.models.gguf.blocks import can_pack, expand, pack
from orpo_mlx.models.gguf.file import GgufFile, read_gguf, tensor_bytes
from orpo_mlx.models.gguf.tokenizer import build_tokenizer
from orpo_mlx.models.stored.model_classes import model_classes

_GROUP = 32
# What weights are expanded to, by the type of the first feed-forward weight; others to float16, as mx.load has it.
_DTYPES = {"F32": mx.float32, "BF16": mx.bfloat16}


def load_gguf(path: Path, dtype: mx.Dtype = mx.float16) -> tuple[nn.Module, dict[str, Any]]:
    """Model (floating point; quantised blocks expanded to `dtype`) and config of a GGUF file.

    Raises:
        ModelError: the file cannot be read, or is of an architecture not known here.
    """
    file = read_gguf(path)
    config = read_config(file)
    model_class, args_class = model_classes(config)
    try:
        model: nn.Module = model_class(args_class.from_dict(config))
        weights = read_weights(file, config, dtype=dtype)
        model.load_weights(list(weights.items()), strict=True)
    except (ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{path}: its tensors do not fit a {config['model_type']} model ({reason_of(error)})."
        ) from None
    return model, config


def read_gguf_info(path: Path) -> tuple[TokenizerWrapper, dict[str, Any]]:
    """Tokenizer and config alone.

    Raises:
        ModelError: see `load_gguf`; or its tokenizer is of a kind not known here.
    """
    file = read_gguf(path)
    config = read_config(file)
    return build_tokenizer(file), config


def gguf_config(path: Path) -> tuple[dict[str, Any], mx.Dtype]:
    """The config of a GGUF file, and the dtype its weights are expanded to.

    Raises:
        ModelError: see `load_gguf`.
    """
    file = read_gguf(path)
    weight = file.tensors.get("blk.0.ffn_up.weight")
    return read_config(file), mx.float32 if weight is None else _DTYPES.get(weight.kind, mx.float16)


def read_weights(
    file: GgufFile, config: dict[str, Any], *, dtype: mx.Dtype = mx.float16, keep_quantised: bool = False
) -> dict[str, mx.array]:
    """All weights under Hugging Face's names.

    Args:
        file: as `read_gguf` gives it.
        config: as `read_config` gives it.
        dtype: what quantised blocks are expanded to.
        keep_quantised: leave blocks of 4 and 8 bits quantised, as MLX's layers hold them, and say so in `config`.

    Raises:
        ModelError: a tensor has no place in this architecture.
    """
    architecture = architecture_of(file)
    weights: dict[str, mx.array] = {}
    kept: dict[str, int] = {}
    for name, tensor in file.tensors.items():
        if not is_weight(name):
            continue
        target = hf_name(file, name)
        data = tensor_bytes(file, tensor)
        if keep_quantised and can_pack(tensor.kind):
            stem = target.removesuffix(".weight")
            packed = pack(tensor.kind, data, tensor.shape)
            kept[stem] = packed.bits
            parts = {f"{stem}.{part}": getattr(packed, part) for part in ("weight", "scales", "biases")}
        else:
            parts = {target: expand(tensor.kind, data, tensor.shape, dtype)}
        heads = permuted_heads(name, config) if architecture.permuted else 0
        for part, array in parts.items():
            weights[part] = unpermute(file, name, array, heads) if heads else array
        # llama.cpp adds the 1 when it converts, mlx-lm's and transformers' layers when they run.
        if architecture.norms_from_one and name.endswith("norm.weight"):
            weights[target] = weights[target] - 1
    # One entry for what most layers have, and one each for the others, as mlx-lm writes mixed quantisation.
    if kept:
        usual = max(kept.values(), key=list(kept.values()).count)
        table: dict[str, Any] = {"group_size": _GROUP, "bits": usual, "mode": "affine"}
        table |= {stem: {"group_size": _GROUP, "bits": bits} for stem, bits in kept.items() if bits != usual}
        config["quantization"] = config["quantization_config"] = table
    return weights


def permuted_heads(name: str, config: dict[str, Any]) -> int:
    """How many heads a tensor has whose rows llama.cpp reordered; 0 for other tensors."""
    if ".attn_q." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".attn_k." in name else 0


def unpermute(file: GgufFile, name: str, weight: mx.array, heads: int) -> mx.array:
    """Undo llama.cpp's reordering of query and key rows, which pairs up the two halves of each head for its RoPE."""
    rows = weight.shape[0]
    if rows % (2 * heads):
        raise ModelError(f"{file.path}: tensor {name!r} has {rows} rows, which {heads} heads do not divide in halves.")
    parts = weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)
