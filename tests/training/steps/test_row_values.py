"""Weights and score margins: what the columns of a row do to its loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_mlx.errors import UserError
from orpo_mlx.training.evaluating.evaluation import evaluate
from orpo_mlx.training.steps.gradients import step_gradient
from orpo_mlx.types import TokenizedPair
from tests.conftest import make_pairs, write_rows
from tests.helpers import float64_losses as oracle
from tests.helpers.quiet_training import make_run

WEIGHTS = [2.0, 1.0, 0.0, 0.5, 1.0, 3.5]


def add_columns(data: Path, columns: dict[str, list[Any]], split: str = "train") -> None:
    """Give the rows of a split further columns."""
    path = data / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    added = zip(*columns.values(), strict=True)
    write_rows(path, [{**row, **dict(zip(columns, more, strict=True))} for row, more in zip(rows, added, strict=True)])


@pytest.mark.parametrize("method", ["orpo", "0.5*dpo + 2*wpo"])
def test_a_weight_multiplies_the_gradient_of_its_pair(settings: dict[str, Any], data: Path, method: str) -> None:
    add_columns(data, {"weight": WEIGHTS})
    changes = {"method": method, "batch_size": 6}
    run = make_run(settings, **changes)
    pairs = list(run.splits["train"].pairs)
    assert [pair.weight for pair in pairs] == WEIGHTS
    alone = [step_gradient(run, [pair._replace(weight=1.0)]) for pair in pairs]
    means = [step.means.means()["loss"] for step in alone]
    for tokens in (2048, 60):
        found = step_gradient(make_run(settings, **changes, micro_batch_tokens=tokens), pairs)
        assert found.means.means()["loss"] == pytest.approx(np.dot(WEIGHTS, means) / 6, rel=1e-5)
        for name, gradient in found.gradients.items():
            expected = sum(weight * np.array(step.gradients[name]) for weight, step in zip(WEIGHTS, alone, strict=True))
            np.testing.assert_allclose(gradient, expected / 6, rtol=0, atol=1e-4 * np.abs(expected).max() + 1e-9)
    held_out = evaluate(
        run.scorer, pairs, run.method, batch_size=4, nll="completion", reference=run.reference, max_seq_length=512
    )
    assert held_out.metrics["loss"] == pytest.approx(np.dot(WEIGHTS, means) / 6, rel=1e-5)


def test_an_untrained_dpo_has_the_loss_of_its_margins(settings: dict[str, Any], data: Path) -> None:
    scores = np.array([3.0, 1.0, -2.0, 0.0, 0.5, 9.0])
    add_columns(data, {"score_chosen": (scores + 1).tolist(), "score_rejected": [1] * 6})
    for split in ("valid", "test"):
        add_columns(data, {"score_chosen": scores.tolist(), "score_rejected": [0] * 6}, split)
    run = make_run(settings, method="dpo", margin_scale=0.4, batch_size=6)
    for name in ("train", "valid"):
        found = evaluate(
            run.scorer,
            run.splits[name].pairs,
            run.method,
            batch_size=4,
            nll="completion",
            reference=run.reference,
            max_seq_length=512,
        )
        assert found.metrics["loss"] == pytest.approx(-oracle.log_sigmoid(-0.4 * scores).mean(), rel=1e-5)
    step = step_gradient(run, list(run.splits["train"].pairs))
    assert step.means.means()["loss"] == pytest.approx(-oracle.log_sigmoid(-0.4 * scores).mean(), rel=1e-5)


def test_rows_without_the_columns_train_as_ever(settings: dict[str, Any], data: Path) -> None:
    run = make_run(settings)
    assert not run.weighted
    assert run.splits["train"].pairs[0] == TokenizedPair(*make_pairs(6)[0][:3], f"{data}/train.jsonl:1")


@pytest.mark.parametrize(
    ("columns", "changes", "expected"),
    [
        (
            {"weight": WEIGHTS},
            {"method": "aot"},
            r"aot sorts the pairs of a batch, so a row's weight .*train.jsonl:1 has",
        ),
        ({"weight": [0] * 6}, {}, r"train.jsonl: the `weight` of every row is 0"),
        ({}, {"margin_scale": 0.1}, r"train.jsonl:1: `margin_scale=0.1` needs scores .* 6 of 6 pairs lack them"),
        ({}, {"margin_scale": 0.1, "method": "sft"}, r"`margin_scale`: method sft has no margin"),
    ],
)
def test_what_would_do_nothing_is_refused(
    settings: dict[str, Any], data: Path, columns: dict[str, list[Any]], changes: dict[str, Any], expected: str
) -> None:
    if columns:
        add_columns(data, columns)
    with pytest.raises(UserError, match=expected):
        make_run({**settings, **changes})
