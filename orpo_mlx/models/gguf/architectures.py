"""What each architecture is called in GGUF: its settings as a config.json, its tensors under Hugging Face's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from orpo_mlx.errors import ModelError
from orpo_mlx.models.gguf.file import GgufFile
from orpo_mlx.models.stored.config_numbers import check_numbers

# GGUF's names of tensors within a layer, and Hugging Face's: most architectures', and what some have besides.
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
# phi3 has query, key and value in one tensor, and the gate in one with `up`, under that name.
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
# Settings that are stored as tensors.
_ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_GEMMA2_27B_LAYERS = 46
# What every llama 3.1 and 3.2 has; a file only carries the frequencies that come of it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


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
    windowed: bool = False
    """Whether it attends within a window where the file states one; files of other kinds carry it unused."""
    own_settings: Callable[[GgufSettings, Mapping[str, Any], int], dict[str, Any]] = lambda *_: {}
    """What only this architecture has, of settings, config so far, and numbers of a head that are rotated."""


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
    architecture = architecture_of(file)
    settings = GgufSettings(file)
    heads = settings.whole("attention.head_count")
    hidden = settings.whole("embedding_length")
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
        "vocab_size": vocabulary_size(file),
        # llama.cpp takes the embedding where a file has no head.
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        **special_ids(file),
    }
    config.update(rope_scaling(file, settings, head_dim))
    window = settings.whole("attention.sliding_window", 0)
    if window and architecture.windowed:
        config["sliding_window"] = window
    check_numbers(config, str(file.path))
    return {**config, **architecture.own_settings(settings, config, rotated)}


class GgufSettings:
    """Numbers under an architecture's name."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self._stem = str(file.metadata.get("general.architecture"))

    def number(self, key: str, default: float | None = None) -> float:
        """A setting that is one number.

        Raises:
            ModelError: it is missing and has no default, or is something else.
        """
        value = self.file.metadata.get(f"{self._stem}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # One for each layer, all alike: as good as one for all.
        if not isinstance(value, int | float) or isinstance(value, bool):
            what = "no" if value is None else f"an unusable value ({type(value).__name__}) for"
            raise ModelError(f"{self.file.path}: the GGUF metadata has {what} {self._stem}.{key}.")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """`number` as a whole number."""
        return int(self.number(key, default))

    def text(self, key: str) -> str | None:
        """A setting that is a text; None where there is none."""
        return self.file.metadata.get(f"{self._stem}.{key}")


def vocabulary_size(file: GgufFile) -> int:
    """Rows of the embedding: files state the number of tokens in several places, and not always the same."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path}: has no token_embd.weight, so it is no language model.")
    return embedding.shape[0]


def special_ids(file: GgufFile) -> dict[str, Any]:
    """The ids of BOS, EOS and padding that a file has, under config.json's names; a list where it has several ends."""
    names = {"bos": "bos_token_id", "padding": "pad_token_id"}
    ids = {names[role]: file.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in names}
    ends = list(dict.fromkeys(end_ids(file)))
    ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    return {name: value if isinstance(value, list) else int(value) for name, value in ids.items() if value is not None}


def end_ids(file: GgufFile) -> list[int]:
    """The tokens that end an answer: of a text, of a turn, of a message that calls a tool."""
    stated = (file.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom"))
    return [int(value) for value in stated if value is not None]


def rope_scaling(file: GgufFile, settings: GgufSettings, head_dim: int) -> dict[str, Any]:
    """`rope_scaling` of config.json; empty where there is none, or phi3's tables say it.

    Raises:
        ModelError: the positions are scaled in a way that config.json cannot express.
    """
    kind = settings.text("rope.scaling.type")
    if "rope_freqs.weight" in file.tensors:
        return {"rope_scaling": _llama3_scaling(file, settings, head_dim)}
    # As in llama.cpp: without a type it is linear, and older files have the factor under another name.
    factor = settings.number("rope.scaling.factor", 0.0) or settings.number("rope.scale_linear", 0.0)
    long = "rope_factors_long.weight" in file.tensors
    if kind == "linear" or (kind is None and not long and factor not in (0.0, 1.0)):
        return {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": factor or 1.0}}
    if kind not in (None, "none", "longrope") or (kind is None and long):
        raise ModelError(
            f"{file.path}: RoPE scaling in a GGUF file is not supported as {kind!r}; use the Hugging Face folder of "
            "this model."
        )
    return {}


def _llama3_scaling(file: GgufFile, settings: GgufSettings, head_dim: int) -> dict[str, Any]:
    """The llama 3 settings that give the very frequency divisors the file carries."""
    found = read_table(file, "rope_freqs.weight")
    # The longest wavelengths are divided by the whole factor, and no other by more.
    factor = float(found.max())
    base = settings.number("rope.freq_base", 10000.0)
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    context = _LLAMA3["original_max_position_embeddings"]
    low = context / _LLAMA3["low_freq_factor"]
    high = context / _LLAMA3["high_freq_factor"]
    # 3 is the difference of the two factors: from 0 at the longer wavelength to 1 at the shorter.
    smooth = (context / wavelengths - 1) / 3
    between = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(wavelengths < high, 1.0, np.where(wavelengths > low, factor, between))
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise ModelError(
            f"{file.path}: RoPE scaling in a GGUF file is not supported with these frequencies; use the Hugging Face "
            "folder of this model."
        )
    return {"rope_type": "llama3", "type": "llama3", "factor": factor, **_LLAMA3}


def read_table(file: GgufFile, name: str) -> np.ndarray[Any, Any]:
    """A list of float32 that is stored as a tensor.

    Raises:
        ModelError: it is of another type or shape.
    """
    tensor = file.tensors[name]
    if tensor.kind != "F32" or len(tensor.shape) != 1:
        raise ModelError(f"{file.path}: {name} is {tensor.kind} of shape {tensor.shape}, expected a list of F32.")
    return np.fromfile(file.path, np.float32, tensor.shape[0], offset=tensor.start)


def gemma2_settings(settings: GgufSettings, config: Mapping[str, Any], _: int) -> dict[str, Any]:
    """Its soft caps, activation, and the scale of its attention, which no file states."""
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


def phi3_settings(settings: GgufSettings, config: Mapping[str, Any], rotated: int) -> dict[str, Any]:
    """Its partial rotation, and the factors of a long context, which are stored as tensors."""
    file = settings.file
    context = settings.whole("rope.scaling.original_context_length", config["max_position_embeddings"])
    own: dict[str, Any] = {
        "partial_rotary_factor": rotated / config["head_dim"],
        "original_max_position_embeddings": context,
    }
    if "rope_factors_long.weight" in file.tensors:
        long, short = (read_table(file, f"rope_factors_{part}.weight").tolist() for part in ("long", "short"))
        own["rope_scaling"] = {
            "type": "longrope",
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
        }
    return own


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _COMMON, permuted=True),
    "mistral": Architecture("mistral", "MistralForCausalLM", _COMMON, permuted=True, windowed=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _COMMON),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_COMMON, **_QK_NORM}),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        {**_COMMON, **_SANDWICH},
        norms_from_one=True,
        windowed=True,
        own_settings=gemma2_settings,
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", {**_COMMON, **_FUSED}, windowed=True, own_settings=phi3_settings),
}
"""By the name a file states."""
