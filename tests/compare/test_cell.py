"""One training and one judgement of a comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_mlx.compare.cell import judge, run_cell, train_cell
from orpo_mlx.config.checks import make_config
from orpo_mlx.data.batching import collate
from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.train import train
from orpo_mlx.training.prepare import prepare
from tests.conftest import make_model, make_pairs
from tests.helpers.small_comparison import quiet

FACTS = ("initial_adapter_sha256", "order_sha256", "data_sha256", "pairs")


def spec(settings: dict[str, Any], *more: str, **changes: Any) -> dict[str, Any]:
    shared = ("--model", settings["model"], "--data", settings["data"], "--batch-size", "2", "--seed", "1")
    argv = [*shared, "--adapter-path", settings["adapter_path"], "--no-memory-check", *more]
    values = {"kind": "train", "labels": "given", "argv": argv, "budget": ["steps", 3], "curve_points": 3}
    return {
        **values,
        "valid_pairs": 4,
        "test_pairs": -1,
        "output": f"{settings['adapter_path']}/out.json",
        "identity": {},
        **changes,
    }


def ignore(share: float) -> None:
    assert 0 <= share <= 1


@pytest.mark.parametrize("method", ["orpo", "dpo"])
def test_it_trains_as_train_does(settings: dict[str, Any], tmp_path: Path, method: str) -> None:
    found = train_cell(spec(settings, "--method", method, "--learning-rate", "1e-2"), ignore)
    other = {**settings, "adapter_path": str(tmp_path / "other"), "method": method, "seed": 1, "learning_rate": 1e-2}
    train(make_config(other), quiet())
    rows = [json.loads(line) for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(found["losses"], [row["loss"] for row in rows if row["split"] == "train"], rtol=1e-5)
    assert (found["steps"], found["pairs_seen"]) == (3, 6)
    assert found["pair_tokens"] == sum(pair.pair_tokens for pair in make_pairs(6))
    assert [point["step"] for point in found["curve"]] == [1, 2, 3]
    assert (found["reference_s"] > 0.1 * found["step_s_median"]) == (method == "dpo")
    assert found["training_s"] >= found["reference_s"] + 2 * found["step_s_median"]
    assert found["curve"][-1]["seconds"] == found["training_s"]
    weights = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in ("adapters", "other")]
    assert len(weights[0]) > 1000


def test_methods_begin_alike_and_seeds_do_not(settings: dict[str, Any]) -> None:
    found = [
        train_cell(spec(settings, "--method", *words), ignore)
        for words in (["orpo"], ["dpo"], ["dpo", "--reference", "copy"], ["orpo", "--seed", "2"])
    ]
    assert len({json.dumps([cell[key] for key in FACTS]) for cell in found[:3]}) == 1
    assert all(found[3][key] != found[0][key] for key in FACTS[:2])
    np.testing.assert_allclose(found[2]["losses"], found[1]["losses"], rtol=1e-5)


@pytest.mark.parametrize(("budget", "steps"), [(["pair_tokens", 60], None), (["seconds", 1e-6], 1)])
def test_other_budgets(settings: dict[str, Any], budget: list[Any], steps: int | None) -> None:
    found = train_cell(spec(settings, budget=budget), ignore)
    assert steps in (None, found["steps"])
    if steps is None:
        # The step that spends the last of it is the last.
        assert found["pair_tokens"] >= 60
        shorter = train_cell(spec(settings, budget=["steps", found["steps"] - 1]), ignore)
        assert shorter["pair_tokens"] < 60


def test_a_loss_that_is_not_finite_is_a_result(settings: dict[str, Any]) -> None:
    found = train_cell(spec(settings, "--learning-rate", "1e30"), ignore)
    assert "the loss is" in found["failed"]
    assert not (Path(settings["adapter_path"]) / "adapters.safetensors").exists()


def test_a_process_of_its_own_writes_the_judgement(settings: dict[str, Any], tmp_path: Path) -> None:
    run_cell(spec(settings, "--learning-rate", "1e-2"), ignore)
    kind = spec(
        settings, "--resume-adapter-file", settings["adapter_path"], kind="test", output=str(tmp_path / "test.json")
    )
    command = [sys.executable, "-m", "orpo_mlx.compare.cell", json.dumps(kind)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(json.loads(line)["progress"] <= 1 for line in done.stdout.splitlines())
    found = json.loads((tmp_path / "test.json").read_text())
    assert len(found["wins_mean"]) == len(found["wins_sum"]) == found["pairs"] == 6
    assert found["accuracy"] == sum(found["wins_mean"]) / 6
    assert found["kl"]["per_reply"] > 0
    assert found["replies"] == []


def test_judged_by_the_base_model(settings: dict[str, Any]) -> None:
    run = prepare(make_config(settings))
    pairs = make_pairs(6, seed=2)
    logps = pair_logps(PairScorer(make_model()), collate(pairs))
    chosen, rejected = logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens
    found = judge(run, run.splits["test"].pairs)
    assert found["accuracy"] == pytest.approx((chosen > rejected).mean().item())
    assert found["accuracy_sum"] == pytest.approx((logps.chosen > logps.rejected).mean().item())
    assert found["margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)
    assert found["nll"] == pytest.approx(-chosen.mean().item(), rel=1e-4)
