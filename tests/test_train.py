"""Runs on a tiny model from beginning to end: what they learn, and what they write."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load as mlx_lm_load

from orpo_mlx.losses.registry import METHODS
from tests.conftest import write_model_folder
from tests.helpers.quiet_training import rows, run_quietly


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_its_train_split(settings: dict[str, Any], method: str) -> None:
    # Their gradients grow exponentially as the chosen side falls below the reference: at 1e-2 rounding decides the end.
    rate = 3e-3 if method in ("dpo_alpha", "dpo_forward_kl") else 1e-2
    metrics = run_quietly({**settings, "method": method, "iters": 30, "learning_rate": rate, "shuffle": False})
    reports = rows(settings, "train")
    assert [row["step"] for row in reports] == list(range(1, 31))
    first, last = (np.mean([row["loss"] for row in part]) for part in (reports[:3], reports[-3:]))
    # The weights of wpo are next to nothing on texts that a random model would never sample, and rise as it learns.
    assert last < first - 0.1 or method == "wpo"
    if method != "sft":
        assert np.mean([row["rewards/accuracies"] for row in reports[-3:]]) > 0.8
    assert set(metrics) == {"valid", "test"}


def test_what_is_written(settings: dict[str, Any]) -> None:
    run_quietly(settings)
    folder = Path(settings["adapter_path"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapters.safetensors",
        "checkpoints",
        "metrics.jsonl",
        "run.json",
        "train.lock",
    ]
    record = json.loads((folder / "run.json").read_text())
    assert record["settings"]["learning_rate"] == 1e-3
    assert record["method_parameters"] == {"orpo": {"beta": 0.1}}
    assert record["data"]["train"]["pairs"] == 6
    assert len(record["data"]["train"]["sha256"]) == 64
    assert record["versions"]["mlx"] == version("mlx")
    keys = {
        "step", "split", "loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected",
        "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    }  # fmt: skip
    for row in rows(settings):
        assert keys <= set(row)
    assert [row["step"] for row in rows(settings, "valid")] == [0, 3]
    assert [row["step"] for row in rows(settings, "test")] == [0, 3]
    for row in rows(settings, "train"):
        assert row["pair_tokens_per_s"] > 0
        assert row["peak_memory_gib"] > 0
        assert row["learning_rate"] == pytest.approx(1e-3)


def test_mlx_lm_loads_the_adapters_as_they_are(settings: dict[str, Any]) -> None:
    run_quietly(settings)
    model, tokenizer = mlx_lm_load(settings["model"], adapter_path=settings["adapter_path"])[:2]
    base = mlx_lm_load(settings["model"])[0]
    ids = mx.array([tokenizer.encode("hello")])
    assert not mx.allclose(model(ids), base(ids), atol=1e-3).item()


@pytest.mark.parametrize("method", ["orpo", "dpo"])
def test_same_seed_same_losses_bit_for_bit(settings: dict[str, Any], method: str, tmp_path: Path) -> None:
    losses = []
    for seed in (0, 0, 1):
        run_quietly({**settings, "method": method, "seed": seed, "lora_parameters": {"dropout": 0.1}})
        losses.append([row["loss"] for row in rows(settings)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_training_on_from_an_adapter_starts_where_it_ended(settings: dict[str, Any], tmp_path: Path) -> None:
    run_quietly({**settings, "adapter_path": str(tmp_path / "first"), "learning_rate": 0.05})
    end = rows({"adapter_path": str(tmp_path / "first")}, "valid")[-1]["loss"]
    run_quietly({**settings, "resume_adapter_file": str(tmp_path / "first" / "adapters.safetensors")})
    assert rows(settings, "valid")[0]["loss"] == pytest.approx(end, rel=1e-6)


def test_a_file_as_data_trains_without_validation(settings: dict[str, Any], data: Path) -> None:
    metrics = run_quietly({**settings, "data": str(data / "train.jsonl")})
    assert metrics == {}
    assert {row["split"] for row in rows(settings)} == {"train"}


def test_a_model_folder_without_a_tokenizer_trains_on_ids(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "bare", tokenizer=False)
    assert set(run_quietly({**settings, "model": str(folder)})) == {"valid", "test"}
