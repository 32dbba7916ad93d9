"""Shapes of well-known models, as far as time and memory depend on them: of their config.json on the Hugging Face Hub.

RoPE scaling changes neither and is left out.
"""

from __future__ import annotations

from typing import Any

_LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5}
LLAMA3: dict[str, Any] = {
    **_LLAMA,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rope_theta": 5e5,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
"""What the models of this family share; `sizes` has the rest."""
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
"""As `LLAMA3`."""


def sizes(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    """What models of one family differ in; `tied` is whether the head is the embedding."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


SMOLLM2_135M: dict[str, Any] = {
    **_LLAMA,
    "head_dim": 64,
    "num_key_value_heads": 3,
    "rope_theta": 1e5,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    **sizes(576, 1536, 30, 9, tied=True),
}
LLAMA_3_2_3B: dict[str, Any] = {**LLAMA3, **sizes(3072, 8192, 28, 24, tied=True)}
LLAMA_3_1_8B: dict[str, Any] = {**LLAMA3, **sizes(4096, 14336, 32, 32, tied=False)}
QWEN3_4B: dict[str, Any] = {**QWEN3, **sizes(2560, 9728, 36, 32, tied=True)}
