"""Choices and checks on made-up cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.compare import parse_plan
from orpo_mlx.compare.results import Cells, JudgementKey, TrainingKey, collect
from orpo_mlx.errors import TrainingError

RATES = (1e-5, 1e-4, 1e-3)
WINS = [1, 1, 1, 0, 0, 1, 0, 1, 1, 0]


def point(step: int, accuracy: float, nll: float = 1.0) -> dict[str, float]:
    return {
        "step": step,
        "seconds": 2.0 * step,
        "pair_tokens": 9,
        "accuracy": accuracy,
        "accuracy_sum": 1,
        "margin": 1,
        "nll": nll,
    }


def trained(*curve: dict[str, float], **changes: Any) -> dict[str, Any]:
    numbers = (
        *("training_s", "reference_s", "step_s_median", "pair_tokens_per_s", "peak_memory_gib", "cache_memory_gib"),
        *("footprint_peak_gib", "steps", "pair_tokens"),
    )
    facts = {"initial_adapter_sha256": "a", "order_sha256": "o", "data_sha256": {"train": "d"}, "pairs": {"valid": 10}}
    own = {"method_parameters": {"orpo": {"beta": 0.1}}, "memory_mode": "fast", "losses": [1.0], "accuracies": [1.0]}
    return {**dict.fromkeys(numbers, 1.0), **facts, **own, "curve": list(curve), **changes}


def judged(wins: list[int], **changes: Any) -> dict[str, Any]:
    share = sum(wins) / len(wins)
    kl = {"per_reply": 1.0, "per_token": 0.1, "replies": 2, "tokens": 20}
    figures = {"accuracy": share, "accuracy_sum": share, "margin": 1.0, "nll": 1.0, "wins_mean": wins, "wins_sum": wins}
    return {**figures, "kl": kl, "replies": [], "reply_tokens": None, "distinct_2": None, **changes}


def test_the_rate_is_the_most_accurate_then_the_gentlest(tmp_path: Path) -> None:
    arm = parse_plan(["--output", str(tmp_path), "--steps", "1", "--methods", "orpo"]).arms[0]
    finals = {1e-5: point(1, 0.5, 0.1), 1e-4: point(1, 0.9, 1.0), 1e-3: point(1, 0.9, 2.0)}
    cells = Cells(trained={TrainingKey("orpo", 0, rate): trained(point(1, 1.0), last) for rate, last in finals.items()})
    cells.choose(arm, RATES)
    assert cells.rates == {"orpo": 1e-4}
    cells.trained[TrainingKey("orpo", 0, 1e-4)]["failed"] = "the loss is nan"
    cells.choose(arm, RATES)
    assert cells.rates == {"orpo": 1e-3}


@pytest.mark.parametrize("key", ["initial_adapter_sha256", "order_sha256", "data_sha256"])
def test_cells_of_a_seed_must_have_begun_alike(key: str) -> None:
    cells = Cells(
        trained={TrainingKey("orpo", 0, 1.0): trained(), TrainingKey("dpo", 0, 1.0): trained(**{key: "other"})}
    )
    with pytest.raises(TrainingError, match=f"dpo, seed 0: its {key} is not that"):
        cells.check()
    cells.trained[TrainingKey("dpo", 1, 1.0)] = cells.trained.pop(TrainingKey("dpo", 0, 1.0))
    cells.check()


def collected(tmp_path: Path, base: float, curves: list[list[dict[str, float]]], **sanity: list[int]) -> dict[str, Any]:
    words = ["--output", str(tmp_path), "--steps", "1", "--methods", "orpo", "--seeds", str(len(curves))]
    plan = parse_plan([*words, "--sanity", "orpo", "--learning-rates", "1e-4"])
    cells = Cells(base=judged(WINS, valid={"accuracy": base}), rates={"orpo": 1e-4})
    for seed, curve in enumerate(curves):
        cells.trained[TrainingKey("orpo", seed, 1e-4)] = trained(*curve)
        cells.tested[JudgementKey("orpo", seed)] = judged(WINS)
    for labels in ("swapped", "shuffled"):
        cells.trained[TrainingKey("orpo", 0, 1e-4, labels=labels)] = trained(point(1, 0.5))
        cells.tested[JudgementKey("orpo", 0, labels)] = judged(sanity.get(labels, WINS))
    return collect(plan, cells)


def test_when_the_target_was_reached(tmp_path: Path) -> None:
    early, late, never = (
        [point(1, 0.95), point(2, 0.8)],
        [point(1, 0.5), point(2, 0.9)],
        [point(1, 0.5), point(2, 0.89)],
    )
    found = collected(tmp_path, 0.4, [early, late, never])["methods"][0]["to_target"]
    assert found == {"steps": [1, 2, None], "seconds": [2.0, 4.0, None]}
    assert collected(tmp_path, 0.9, [late])["methods"][0]["to_target"] == {"steps": [0.0], "seconds": [0.0]}


def test_sanity(tmp_path: Path) -> None:
    worse, best = [1] + [0] * 9, [1] * 10

    def holds(**arms: list[int]) -> list[bool | None]:
        return [row["holds"] for row in collected(tmp_path, 0.4, [[point(1, 0.5)]], **arms)["sanity"]]

    assert holds(swapped=worse) == [True, None]
    assert holds(swapped=WINS, shuffled=best) == [False, None]


def test_one_setting_is_no_grid(tmp_path: Path) -> None:
    arm = collected(tmp_path, 0.4, [[point(1, 0.5)]])["methods"][0]
    assert arm["grid"] == []
    assert arm["sensitivity"] is None
    assert "reply_tokens" not in arm["summary"]
