"""Reward accuracy by category, from log-probs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_mlx.cli.score import main
from orpo_mlx.judging.categories import ALL, accuracies
from tests.conftest import write_rows
from tests.helpers.tuned_adapters import ANSWER, PROMPT, tuned_adapters


def row(chosen: float, rejected: float, tokens: tuple[int, int] = (1, 1)) -> dict[str, float]:
    sums = {"chosen_logps": chosen, "rejected_logps": rejected}
    return {**sums, "chosen_mean_logps": chosen / tokens[0], "rejected_mean_logps": rejected / tokens[1]}


def test_each_reward_in_each_category() -> None:
    rows = [row(-4, -3, (4, 1)), row(-1, -2), row(-2, -2), row(-5, -1)]
    base = [row(-9, -3), row(-1, -2), row(-2, -2), row(-9, -1)]
    found = accuracies(rows, base, ["a", "a", "b", "b"])
    shares = {name: [each["categories"][key]["accuracy"] for key in (ALL, "a", "b")] for name, each in found.items()}
    assert shares == {
        "mean_logps": [0.625, 1, 0.25],
        "sum_logps": [0.375, 0.5, 0.25],
        # The reference prefers the rejected sides more; where both are the same, the reward is equal.
        "log_ratio": [0.75, 0.75, 0.75],
    }
    assert found["sum_logps"]["mean_of_categories"] == 0.375
    assert "log_ratio" not in accuracies(rows, None, ["a"] * 4)


def test_score_writes_a_table_and_a_picture(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = tuned_adapters(tmp_path, model_folder, iters=40)
    evil = "<script>x</script>"
    rows = [{"prompt": PROMPT, "chosen": ANSWER, "rejected": "no", "subset": name} for name in (evil, "other", evil)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    argv = ["--model", str(model_folder), "--data", str(data), "--output", str(tmp_path / "o.jsonl")]
    assert main([*argv, "--adapter-path", str(adapters), "--categories", str(tmp_path)]) == 0
    assert "100.0%" in capsys.readouterr().out
    found = json.loads((tmp_path / "categories.json").read_text())
    assert found["log_ratio"]["categories"][evil] == found["mean_logps"]["categories"][evil]
    assert found["log_ratio"]["categories"][evil]["pairs"] == 2
    assert evil not in (tmp_path / "categories.html").read_text()
    assert (tmp_path / "categories.png").stat().st_size > 1000
    assert main([*argv, "--categories", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
