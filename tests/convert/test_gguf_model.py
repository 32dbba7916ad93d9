"""Whole models as GGUF: the tensors llama.cpp's script would write, and the same model for this package's reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.rope_utils import Llama3RoPE
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from orpo_mlx.cli.convert import main
from orpo_mlx.convert import gguf_model
from orpo_mlx.models.gguf.architectures import read_config
from orpo_mlx.models.gguf.file import read_gguf
from orpo_mlx.models.gguf.loading import read_gguf_info, read_weights
from orpo_mlx.models.loading import find, load
from tests.conftest import SPECIAL_TOKENS, make_model, model_config, write_model_folder
from tests.convert.test_conversions import write_adapter_folder
from tests.models.gguf.test_loading import gguf_arrays

gguf = pytest.importorskip("gguf")
KINDS = ("llama", "mistral", "qwen2", "qwen3")
IDS = mx.array([[5, 6, 7, 8, 9]])


def stored(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A file's tensors as the `gguf` package reads them."""
    return {str(tensor.name): np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def test_of_several_chat_templates_the_default_is_written(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "Llama-0.6B")
    write_tokenizer(folder, pre_tokenizers.ByteLevel(add_prefix_space=False))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    default = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    templates = [{"name": "default", "template": default}, {"name": "tool_use", "template": "{{ tools }}"}]
    file.write_text(json.dumps({**config, "chat_template": templates}))
    assert main(["to-gguf", str(folder), str(tmp_path / "model.gguf")]) == 0
    metadata = read_gguf(tmp_path / "model.gguf").metadata
    assert metadata["tokenizer.chat_template"] == default
    assert metadata["general.name"] == "Llama-0.6B"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_what_llama_cpp_expects_and_is_the_model_again(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model_folder(tmp_path / "hf", kind)
    write_tokenizer(folder, pre_tokenizers.ByteLevel(add_prefix_space=False))
    output = tmp_path / "model.gguf"
    assert main(["to-gguf", str(folder), str(output)]) == 0
    assert "compared with the model as it was: worst 0.00e+00" in capsys.readouterr().out
    expected = gguf_arrays(kind)
    found = stored(output)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], np.array(array), err_msg=name)
    metadata = read_gguf(output).metadata
    assert metadata["general.architecture"] == {"mistral": "llama"}.get(kind, kind)
    assert mx.array_equal(load(str(output)).model(IDS), make_model(kind)(IDS)).item()
    assert ("output.weight" in found) == (not model_config(kind).get("tie_word_embeddings"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_half_precision_is_rounded_once_and_norms_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_model_folder(tmp_path / "hf"), tmp_path / "model.gguf"
    for dtype, kind in (("float16", "F16"), ("bfloat16", "BF16")):
        assert main(["to-gguf", str(folder), str(output), "--dtype", dtype, "--overwrite"]) == 0
        kinds = {name: tensor.kind for name, tensor in read_gguf(output).tensors.items()}
        assert {kinds[name] for name in kinds if "norm" in name} == {"F32"}
        assert {kinds[name] for name in kinds if "norm" not in name} == {kind}
        said = capsys.readouterr().out
        assert f"compared with its matrices in {dtype}: worst 0.00e+00" in said
        expected = {
            name: np.array(array.astype(getattr(mx, dtype) if array.ndim > 1 else mx.float32).astype(mx.float32))
            for name, array in gguf_arrays("llama").items()
        }
        found = read_weights(read_gguf(output), read_config(read_gguf(output)))
        embedding = np.array(found["model.embed_tokens.weight"].astype(mx.float32))
        np.testing.assert_array_equal(embedding, expected["token_embd.weight"])
        np.testing.assert_array_equal(stored(output)["output_norm.weight"], expected["output_norm.weight"])


@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_an_adapter_is_merged(tmp_path: Path, fine_tune_type: str) -> None:
    folder = write_model_folder(tmp_path / "hf")
    adapter = write_adapter_folder(tmp_path / "adapters", "llama", fine_tune_type)
    whole, merged = tmp_path / "model.gguf", tmp_path / "merged"
    assert main(["to-gguf", str(folder), str(whole), "--adapter-path", str(adapter)]) == 0
    assert main(["merge", "--model", str(folder), "--adapter-path", str(adapter), str(merged), "--no-verify"]) == 0
    ids = mx.array([[3, 4, 5]])
    np.testing.assert_array_equal(np.array(load(str(whole)).model(ids)), np.array(load(str(merged)).model(ids)))


def test_the_tokenizer_and_the_ends_come_back(tmp_path: Path) -> None:
    folder, output = write_model_folder(tmp_path / "hf"), tmp_path / "model.gguf"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [258, 4]}))
    assert main(["to-gguf", str(folder), str(output)]) == 0
    before, after = find(str(folder)).tokenizer, read_gguf_info(output)[0]
    assert before is not None
    assert set(after.eos_token_ids) == set(before.eos_token_ids)
    assert after.encode("<|start|>ä b 12<|end|>") == before.encode("<|start|>ä b 12<|end|>")
    assert after.chat_template == before.chat_template
    assert (after.eos_token, after.pad_token) == ("<|end|>", "<|pad|>")
    # Rows without a token are marked as unused (5), special tokens as control tokens (3).
    types = list(read_gguf(output).metadata["tokenizer.ggml.token_type"])
    assert len(types) == config["vocab_size"]
    assert types.count(3) == len(SPECIAL_TOKENS)
    assert types.count(5) == config["vocab_size"] - len(before._tokenizer)


_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("name", "digits", "normalised", "ignore"),
    [("llama-bpe", "{1,3}", False, True), ("qwen2", "", True, False), ("deepseek-r1-qwen", "", False, False)],
)
def test_the_pre_tokenizer_is_told_from_what_it_does(
    name: str, digits: str, normalised: bool, ignore: bool, tmp_path: Path
) -> None:
    """As the tokenizer.json of Llama 3 and Qwen 2 has it."""
    # Not qwen2's: transformers builds that one's tokenizer anew and heeds the file no more.
    folder = write_model_folder(tmp_path / "hf")
    cut = pre_tokenizers.Split(Regex(_CUT.replace("{DIGITS}", digits)), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    write_tokenizer(folder, pre_tokenizers.Sequence([cut, as_bytes]), normalised, ignore)
    assert main(["to-gguf", str(folder), str(tmp_path / "m.gguf")]) == 0
    assert read_gguf(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == name


def write_tokenizer(folder: Path, division: Any, normalised: bool = False, ignore: bool = False) -> None:
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["12"] = 256
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2")], ignore_merges=ignore))
    tokenizer.pre_tokenizer = division
    tokenizer.decoder = decoders.ByteLevel()
    if normalised:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    # Without special tokens, of which the usual ones are more than the tiny qwen2 has rows for.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def test_llama_3_frequencies_are_those_the_model_runs_with(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder, output = write_model_folder(tmp_path / "hf"), tmp_path / "model.gguf"
    config = {**model_config("llama"), "rope_theta": 500000.0, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["to-gguf", str(folder), str(output)]) == 0
    base = 500000.0 ** (mx.arange(0, 8, 2) / 8)
    expected = Llama3RoPE(dims=8, base=500000.0, scaling_config=scaling)._freqs / base
    np.testing.assert_allclose(stored(output)["rope_freqs.weight"], np.array(expected), rtol=1e-5)


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {kind: write_model_folder(tmp_path / kind, kind) for kind in ("llama", "gemma2")}
    folders["bare"] = write_model_folder(tmp_path / "bare", tokenizer=False)
    for name, changes in (("yarn", {"rope_scaling": {"type": "yarn", "factor": 4.0}}), ("bias", {"mlp_bias": True})):
        folders[name] = write_model_folder(tmp_path / name)
        (folders[name] / "config.json").write_text(json.dumps({**model_config("llama"), **changes}))
    folders["words"] = write_model_folder(tmp_path / "words")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.save(str(folders["words"] / "tokenizer.json"))
    folders["divided"] = write_model_folder(tmp_path / "divided")
    write_tokenizer(folders["divided"], pre_tokenizers.ByteLevel(add_prefix_space=True))
    for name, output, message in (
        ("gemma2", "a.gguf", "a gemma2 model is not written to GGUF here, only llama"),
        ("bare", "a.gguf", "has no tokenizer"),
        ("yarn", "a.gguf", "RoPE scaling of type yarn"),
        ("bias", "a.gguf", "its mlp_bias is True"),
        ("words", "a.gguf", "is no byte-level BPE"),
        ("divided", "a.gguf", "divides texts as none of gpt-2"),
        ("llama", "a.bin", "expected a file that ends in .gguf"),
        ("llama", "nowhere/a.gguf", "in a folder that exists"),
    ):
        assert main(["to-gguf", str(folders[name]), str(tmp_path / output), "--no-verify"]) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert len(error.splitlines()) == 1
        assert len(error) < 400
    assert list(tmp_path.glob("*.gguf")) == []


def test_a_wrong_file_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = write_model_folder(tmp_path / "hf"), tmp_path / "model.gguf"
    monkeypatch.setattr(gguf_model, "permuted", lambda matrix, *_: matrix)
    assert main(["to-gguf", str(folder), str(output)]) == 2
    assert "verification failed: log-probs differ" in capsys.readouterr().err
    assert not output.exists()
    assert main(["to-gguf", str(folder), str(output), "--no-verify"]) == 0
    assert main(["to-gguf", str(folder), str(output)]) == 2
    assert "exists already; give --overwrite" in capsys.readouterr().err
