"""Heads that are stored, or not, against what the config says: as transformers 5 decides it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.errors import ModelError
from orpo_mlx.models.loading import load
from tests.conftest import make_model, model_config

IDS = mx.array([[3, 1, 4, 1, 5]])


def write(folder: Path, kind: str, weights: dict[str, mx.array], **config: Any) -> Path:
    stated = {key: value for key, value in {**model_config(kind), **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(stated))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.mark.parametrize("stated", [True, None])
def test_a_stored_head_that_differs_is_used_whatever_the_config_says(stated: bool | None, tmp_path: Path) -> None:
    model = make_model("llama")
    weights = dict(tree_flatten(model.parameters()))
    assert "lm_head.weight" in weights
    loaded = load(str(write(tmp_path, "llama", weights, tie_word_embeddings=stated)))
    assert mx.array_equal(loaded.model(IDS), model(IDS)).item()


@pytest.mark.parametrize("stated", [True, None])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_a_stored_head_that_is_the_embedding_again_changes_nothing(
    kind: str, stated: bool | None, tmp_path: Path
) -> None:
    model = make_model(kind)
    weights = dict(tree_flatten(model.parameters()))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    loaded = load(str(write(tmp_path, kind, weights, tie_word_embeddings=stated)))
    assert mx.array_equal(loaded.model(IDS), model(IDS)).item()
    assert "lm_head.weight" not in dict(tree_flatten(loaded.model.parameters()))


def test_a_head_that_the_config_promises_and_nobody_stored(tmp_path: Path) -> None:
    weights = dict(tree_flatten(make_model("llama").parameters()))
    del weights["lm_head.weight"]
    with pytest.raises(ModelError, match=r"Missing 1 parameters: lm_head\.weight"):
        load(str(write(tmp_path, "llama", weights, tie_word_embeddings=False)))
