"""Configs with numbers that no model has: one sentence, before anything is built by them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.errors import ModelError
from orpo_mlx.memory.skeleton import build, read_blueprint
from orpo_mlx.models.loading import load
from tests.conftest import make_model, model_config

VALUES: tuple[Any, ...] = (2**40, 10**400, -1, 0, 1e308, "x", None, [])
FULL = {"tie_word_embeddings": False, "rope_theta": 1e4, "max_position_embeddings": 64, "head_dim": 8}


def said(way: Callable[[str], object], path: str) -> str:
    """What a ModelError says; empty where there is none."""
    try:
        way(path)
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_no_number_of_a_config_ends_in_a_traceback(kind: str, tmp_path: Path) -> None:
    weights = dict(tree_flatten(make_model(kind).parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    config = {**FULL, **model_config(kind)} if kind != "gemma3" else model_config(kind)
    inner = config.get("text_config", config)
    for key in list(inner):
        kept = inner[key]
        for value in VALUES:
            inner[key] = value
            (tmp_path / "config.json").write_text(json.dumps(config))
            for way in (load, lambda name: build(read_blueprint(name), 1)):
                assert len(said(way, str(tmp_path))) < 400 + len(str(tmp_path))
        inner[key] = kept


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"])
def test_the_number_is_named_at_once(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**model_config("llama"), key: 10**12}))
    began = time.monotonic()
    with pytest.raises(ModelError, match=f"config.json: {key} is 1000000000000"):
        load(str(tmp_path))
    assert time.monotonic() - began < 1
