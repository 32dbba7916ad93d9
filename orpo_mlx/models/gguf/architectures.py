"""What each architecture is called in GGUF: its settings as a config.json, its tensors under Hugging Face's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from orpo_mlx.errors import ModelError
from orpo_mlx.models.gguf.file import GgufFile

_COMMON = {
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
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_GEMMA2_27B_LAYERS = 46
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every llama 3.1 and 3.2 has; a file only carries the frequencies that come of it."""


class Architecture(NamedTuple):
    """How one architecture is written."""

    model_type: str
    """Hugging Face's name for it."""
    class_name: str
    names: Mapping[str, str]
    """GGUF's name of a tensor, within its layer, to Hugging Face's."""
    permuted: bool = False
    """Whether query and key rows are reordered for llama.cpp's RoPE."""
    norms_from_one: bool = False
    """Whether norm weights are stored with one added, which the model adds itself."""


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _COMMON, permuted=True),
    "mistral": Architecture("mistral", "MistralForCausalLM", _COMMON, permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _COMMON),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_COMMON, **_QK_NORM}),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", {**_COMMON, **_SANDWICH}, norms_from_one=True),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", {**_COMMON, **_FUSED}),
}


def architecture_of(file: GgufFile) -> Architecture:
    """The architecture a file states.

    Raises:
        ModelError: it is not one of `ARCHITECTURES`.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: GGUF architecture {name!r} is not supported, only {', '.join(ARCHITECTURES)} are; use a "
            "Hugging Face folder."
        )
    return ARCHITECTURES[name]


def hf_name(file: GgufFile, name: str) -> str:
    """Hugging Face's name for a tensor.

    Raises:
        ModelError: the architecture has no such tensor.
    """
    architecture = architecture_of(file)
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None or found[2] not in architecture.names:
        raise ModelError(f"{file.path}: tensor {name!r} has no place in a {architecture.model_type} model.")
    layer = "" if found[1] is None else f"model.layers.{found[1]}."
    return f"{layer}{architecture.names[found[2]]}.{found[3]}"


def is_weight(name: str) -> bool:
    """False for tables that are settings, stored as tensors."""
    return name not in _ROPE_TABLES


def read_config(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model in a file.

    Raises:
        ModelError: it is of another architecture, or a setting is missing or cannot be expressed.
    """
    architecture, settings = architecture_of(file), _Settings(file)
    heads, hidden = settings.whole("attention.head_count"), settings.whole("embedding_length")
    rotated = settings.whole("rope.dimension_count", hidden // max(heads, 1))
    head_dim = settings.whole("attention.key_length", rotated if architecture.permuted else hidden // max(heads, 1))
    config = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "hidden_size": hidden,
        "intermediate_size": settings.whole("feed_forward_length"),
        "num_hidden_layers": settings.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.number("rope.freq_base", 10000.0),
        "max_position_embeddings": settings.whole("context_length"),
        "vocab_size": _vocabulary(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        **_special_ids(file),
    }
    config.update(_rope_scaling(file, settings, head_dim))
    window = settings.whole("attention.sliding_window", 0)
    if window and architecture.model_type in ("mistral", "phi3", "gemma2"):
        config["sliding_window"] = window
    return {**config, **_OWN.get(architecture.model_type, lambda *_: {})(settings, config, rotated)}


class _Settings:
    """Numbers under an architecture's name."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self._stem = file, str(file.metadata.get("general.architecture"))

    def number(self, key: str, default: float | None = None) -> float:
        value = self.file.metadata.get(f"{self._stem}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # One for each layer, all alike.
        if not isinstance(value, int | float) or isinstance(value, bool):
            what = "no" if value is None else f"an unusable value ({type(value).__name__}) for"
            raise ModelError(f"{self.file.path}: the GGUF metadata has {what} {self._stem}.{key}.")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        return int(self.number(key, default))

    def text(self, key: str) -> str | None:
        return self.file.metadata.get(f"{self._stem}.{key}")


def _vocabulary(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path}: has no token_embd.weight, so it is no language model.")
    return embedding.shape[0]


def _special_ids(file: GgufFile) -> dict[str, int]:
    ids = {role: file.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "padding")}
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return {names[role]: int(value) for role, value in ids.items() if value is not None}


def _rope_scaling(file: GgufFile, settings: _Settings, head_dim: int) -> dict[str, Any]:
    kind = settings.text("rope.scaling.type")
    if "rope_freqs.weight" in file.tensors:
        return {"rope_scaling": _llama3_scaling(file, settings, head_dim)}
    if kind == "linear":
        return {"rope_scaling": {"type": kind, "rope_type": kind, "factor": settings.number("rope.scaling.factor")}}
    if kind not in (None, "none", "longrope") or (kind is None and "rope_factors_long.weight" in file.tensors):
        raise ModelError(
            f"{file.path}: RoPE scaling in a GGUF file is not supported as {kind!r}; use the Hugging Face folder of "
            "this model."
        )
    return {}


def _llama3_scaling(file: GgufFile, settings: _Settings, head_dim: int) -> dict[str, Any]:
    """The llama 3 settings that give the very frequency divisors the file carries."""
    found = _table(file, "rope_freqs.weight")
    factor = float(found.max())
    base = settings.number("rope.freq_base", 10000.0)
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = (
        _LLAMA3["original_max_position_embeddings"] / _LLAMA3[f"{part}_freq_factor"] for part in ("low", "high")
    )
    smooth = (_LLAMA3["original_max_position_embeddings"] / wavelengths - 1) / 3
    between = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(wavelengths < high, 1.0, np.where(wavelengths > low, factor, between))
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise ModelError(
            f"{file.path}: RoPE scaling in a GGUF file is not supported with these frequencies; use the Hugging Face "
            "folder of this model."
        )
    return {"rope_type": "llama3", "type": "llama3", "factor": factor, **_LLAMA3}


def _table(file: GgufFile, name: str) -> np.ndarray[Any, Any]:
    tensor = file.tensors[name]
    if tensor.kind != "F32" or len(tensor.shape) != 1:
        raise ModelError(f"{file.path}: {name} is {tensor.kind} of shape {tensor.shape}, expected a list of F32.")
    return np.fromfile(file.path, np.float32, tensor.shape[0], offset=tensor.start)


def _gemma2(settings: _Settings, config: Mapping[str, Any], _: int) -> dict[str, Any]:
    # llama.cpp knows the largest by its number of layers: it alone divides by hidden size over heads.
    large = config["num_hidden_layers"] == _GEMMA2_27B_LAYERS
    scalar = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    return {
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": settings.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": settings.number("final_logit_softcapping", 30.0),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _phi3(settings: _Settings, config: Mapping[str, Any], rotated: int) -> dict[str, Any]:
    file = settings.file
    own: dict[str, Any] = {"partial_rotary_factor": rotated / config["head_dim"]}
    own["original_max_position_embeddings"] = settings.whole(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    if "rope_factors_long.weight" in file.tensors:
        long, short = (_table(file, f"rope_factors_{part}.weight").tolist() for part in ("long", "short"))
        own["rope_scaling"] = {
            "type": "longrope",
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
        }
    return own


_OWN = {"gemma2": _gemma2, "phi3": _phi3}
