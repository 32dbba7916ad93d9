"""Read a GGUF file of the llama family into an mlx-lm model and tokenizer, without torch.

Weights are read by `mx.load`, which unpacks the block formats MLX knows (F32, F16, Q4_0, Q4_1, Q8_0) into its own
quantised layout; here they are expanded to floating point.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from mlx_lm.utils import _get_classes
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orpo_mlx.errors import ModelError

_GROUP_SIZE = 32
_CONTROL_TOKEN, _USER_TOKEN = 3, 4

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_gguf(path: Path) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Model (floating point, dtype of the file), tokenizer and config of a llama-family GGUF file.

    Raises:
        ModelError: the file cannot be read, is of another architecture, or its tokenizer is of a kind not known here.
    """
    arrays, metadata = _read(path)
    config = _config(path, metadata, arrays)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    weights = _weights(path, arrays, config)
    try:
        model.load_weights(list(model.sanitize(weights).items()), strict=True)
    except ValueError as error:
        raise ModelError(f"{path}: its tensors do not fit a llama model ({str(error).splitlines()[0]}).") from None
    return model, _tokenizer(path, metadata), config


def read_gguf_head(path: Path) -> tuple[TokenizerWrapper, dict[str, Any]]:
    """Tokenizer and config alone.

    Raises:
        ModelError: see `load_gguf`.
    """
    arrays, metadata = _read(path)
    return _tokenizer(path, metadata), _config(path, metadata, arrays)


def gguf_config(path: Path) -> tuple[dict[str, Any], mx.Dtype]:
    """The config of a llama-family GGUF file, and the dtype its weights are expanded to.

    Raises:
        ModelError: see `load_gguf`.
    """
    arrays, metadata = _read(path)
    stem = "blk.0.ffn_up."
    weight = arrays.get(f"{stem}scales", arrays.get(f"{stem}weight"))
    return _config(path, metadata, arrays), mx.float32 if weight is None else weight.dtype


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    try:
        loaded: Any = mx.load(str(path), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as GGUF ({str(error).splitlines()[0]}).") from None
    arrays, metadata = loaded
    return arrays, metadata


def _config(path: Path, metadata: dict[str, Any], arrays: dict[str, mx.array]) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelError(
            f"{path}: GGUF architecture {architecture!r} is not supported, only 'llama' is; use a Hugging Face folder."
        )

    def number(key: str, default: float | None = None) -> Any:
        value = metadata.get(f"llama.{key}")
        if value is None and default is None:
            raise ModelError(f"{path}: the GGUF metadata has no llama.{key}.")
        return default if value is None else value.item()

    if any(key.startswith("llama.rope.scaling") for key in metadata) or "rope_freqs.weight" in arrays:
        raise ModelError(
            f"{path}: RoPE scaling in a GGUF file is not supported; use the Hugging Face folder of this model."
        )
    heads = number("attention.head_count")
    hidden_size = number("embedding_length")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden_size,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("rope.dimension_count", hidden_size // heads),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "max_position_embeddings": number("context_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in arrays,
        "eos_token_id": int(metadata["tokenizer.ggml.eos_token_id"].item()),
    }


def _weights(path: Path, arrays: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    weights = {}
    for name, array in arrays.items():
        stem, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        prefix, _, part = stem.rpartition(".")
        if part not in _TENSORS or kind != "weight":
            raise ModelError(f"{path}: tensor {name!r} has no place in a llama model.")
        if f"{stem}.scales" in arrays:
            array = _expand(array, arrays[f"{stem}.scales"], arrays[f"{stem}.biases"])
        if part in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            array = _unpermute(array, heads)
        layer = prefix.replace("blk.", "model.layers.")
        weights[f"{layer}.{_TENSORS[part]}.{kind}".lstrip(".")] = array
    return weights


def _expand(packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """Quantised blocks to the dtype of their scales (float16), as MLX itself expands them when it runs quantised."""
    bits = 32 * packed.shape[-1] // (scales.shape[-1] * _GROUP_SIZE)
    return mx.dequantize(packed, scales, biases, group_size=_GROUP_SIZE, bits=bits)


def _unpermute(weight: mx.array, heads: int) -> mx.array:
    """Undo llama.cpp's reordering of query and key rows, which pairs up the two halves of each head for its RoPE."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """How text is cut before BPE, by the name GGUF gives it; None for an unknown name."""
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in ("llama-bpe", "llama3", "llama-v3"):
        split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return None


def _tokenizer(path: Path, metadata: dict[str, Any]) -> TokenizerWrapper:
    kind, name = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    cut = _pre_tokenizer(name) if kind == "gpt2" else None
    if cut is None:
        raise ModelError(
            f"{path}: GGUF tokenizer {kind!r} with pre-tokenizer {name!r} is not supported; use a Hugging Face folder."
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"].tolist()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (_CONTROL_TOKEN, _USER_TOKEN):
            special = token_type == _CONTROL_TOKEN
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])

    def special_token(role: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[int(index.item())]

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special_token("bos"),
        eos_token=special_token("eos"),
        unk_token=special_token("unknown"),
        pad_token=special_token("padding"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )
    return TokenizerWrapper(fast, BPEStreamingDetokenizer)
