"""`full_model`: embeddings, final norm and head trained as well, also where the head is the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from orpo_mlx.engine.modes import MODES
from orpo_mlx.training.steps.gradients import step_gradient
from orpo_mlx.training.steps.step import optimiser_step
from tests.conftest import write_model_folder
from tests.helpers.quiet_training import make_run, run_quietly


@pytest.fixture(params=["untied", "tied"])
def whole(request: pytest.FixtureRequest, settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings that train all of a tiny llama."""
    model = write_model_folder(tmp_path / "model")
    if request.param == "tied":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        weights = mx.load(str(model / "model.safetensors"))
        assert isinstance(weights, dict)
        mx.save_safetensors(
            str(model / "model.safetensors"), {k: w for k, w in weights.items() if k != "lm_head.weight"}
        )
    return {**settings, "model": str(model), "fine_tune_type": "full", "full_model": True, "batch_size": 3, "iters": 3}


def test_every_memory_mode_takes_the_steps_of_plain(whole: dict[str, Any]) -> None:
    found = {}
    for memory in MODES:
        run = make_run(whole, memory=memory)
        pairs = run.splits["train"].pairs[:]
        gradients = step_gradient(run, pairs).gradients
        found[memory] = gradients, [optimiser_step(run, pairs, step).means()["loss"] for step in (1, 2, 3)]
    plain, losses = found.pop("plain")
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(plain)
    for gradients, own in found.values():
        assert own == pytest.approx(losses, rel=1e-5)
        assert gradients.keys() == plain.keys()
        for name, expected in plain.items():
            scale = max(1e-3, float(mx.abs(expected).max()))
            np.testing.assert_allclose(np.array(gradients[name]), np.array(expected), rtol=0, atol=1e-4 * scale)
    assert losses[2] < losses[0]


def test_it_is_saved_resumed_and_generated_with(whole: dict[str, Any], tmp_path: Path) -> None:
    folders = [tmp_path / "at once", tmp_path / "in two"]
    run_quietly({**whole, "adapter_path": str(folders[0])})
    run_quietly({**whole, "adapter_path": str(folders[1]), "iters": 2})
    run_quietly({**whole, "adapter_path": str(folders[1]), "resume": True})
    one, other = (mx.load(str(folder / "adapters.safetensors")) for folder in folders)
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    assert set(one) == set(other) >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    model, tokenizer = mlx_lm.load(whole["model"], adapter_path=str(folders[1]))[:2]
    assert mx.array_equal(model.model.embed_tokens.weight, one["model.embed_tokens.weight"]).item()
    assert isinstance(mlx_lm.generate(model, tokenizer, "abc", max_tokens=3), str)
