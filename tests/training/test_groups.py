"""Groups are what their pairs written out are, at a fraction of the tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_mlx.data.batching import micro_batches, padded_tokens
from orpo_mlx.device_profile import CPU, GPU
from orpo_mlx.errors import DataError
from orpo_mlx.training.steps.gradients import step_gradient
from tests.helpers.quiet_training import make_run


def rated_rows(counts: list[int]) -> list[dict[str, Any]]:
    """Rows of token ids, one with as many rated completions as each of `counts`; some are tied."""
    rng = np.random.default_rng(1)
    return [
        {
            "prompt_ids": rng.integers(3, 90, int(rng.integers(40, 60))).tolist(),
            "completion_ids": [rng.integers(3, 90, int(rng.integers(20, 28))).tolist() for _ in range(count)],
            "scores": [float(score) for score in rng.permutation(count) // (1 + (number == 1))],
        }
        for number, count in enumerate(counts)
    ]


def written_out(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's pairs as rows."""
    scored = list(zip(row["scores"], row["completion_ids"], strict=True))
    return [
        {"prompt_ids": row["prompt_ids"], "chosen_ids": better[1], "rejected_ids": worse[1]}
        for better, worse in itertools.permutations(scored, 2)
        if better[0] > worse[0]
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("method", "nll", "memory"),
    [("dpo", "completion", "fast"), ("orpo", "sequence", "balanced"), ("aot", "completion", "thrift")],
)
def test_all_pairs_of_groups_are_the_pairs_written_out(
    settings: dict[str, Any], tmp_path: Path, method: str, nll: str, memory: str
) -> None:
    rows = rated_rows([4, 4, 2, 3])
    given = {"groups": write(tmp_path / "groups.jsonl", rows)}
    given["pairs"] = write(tmp_path / "pairs.jsonl", [pair for row in rows for pair in written_out(row)])
    results = []
    for name, data in given.items():
        run = make_run(settings, data=data, method=method, nll=nll, memory=memory, pair_ratings="all", batch_size=50)
        found = step_gradient(run, run.splits["train"].pairs[:])
        results.append((found.means.means(), found.gradients, found.means.pairs))
        if method == "dpo" and name == "groups":
            table = run.reference.table  # type: ignore[union-attr]
            # Two completions an entry, not two an ordered pair.
            assert len(table) == 2 + 2 + 1 + 2
    (metrics, gradients, pairs), (expected, expected_gradients, expected_pairs) = results
    assert pairs == expected_pairs == sum(len(written_out(row)) for row in rows)
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for name, value in expected_gradients.items():
        scale = max(1e-3, float(np.abs(np.array(value)).max()))
        np.testing.assert_allclose(np.array(gradients[name]), np.array(value), rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("layout", [CPU.layout, GPU.layout])
def test_four_completions_cost_less_than_half_of_their_six_pairs(
    settings: dict[str, Any], tmp_path: Path, layout: Any
) -> None:
    rows = [row for row in rated_rows([4] * 8) if len(set(row["scores"])) == 4]
    tokens = []
    for data in (rows, [pair for row in rows for pair in written_out(row)]):
        run = make_run(settings, data=write(tmp_path / "rows.jsonl", data), pair_ratings="all")
        tokens.append(
            sum(padded_tokens(part, layout) for part in micro_batches(run.splits["train"].pairs, 4, 4096, layout))
        )
    assert tokens[0] <= 0.45 * tokens[1]


def test_rows_without_pairs_are_refused_by_methods_for_pairs(settings: dict[str, Any], tmp_path: Path) -> None:
    for row, expected in (
        ({"prompt_ids": [1], "completion_ids": [2], "label": True}, "one completion with a label"),
        (rated_rows([3])[0], "`pair_ratings=best_worst`, all or adjacent"),
    ):
        with pytest.raises(
            DataError, match=f"rows.jsonl:1: method dpo learns from pairs, and the row holds .*{expected}"
        ):
            make_run(settings, data=write(tmp_path / "rows.jsonl", [row]), method="dpo")
