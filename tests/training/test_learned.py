"""A run that did not learn says so at its end."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_mlx.config.checks import make_config
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.train import train
from orpo_mlx.training.data_order import default_epochs, total_steps
from orpo_mlx.training.learned import chance_bound
from tests.conftest import make_pairs, write_id_rows


@pytest.mark.parametrize("pairs", [8, 20, 100, 500])
def test_a_coin_is_above_the_bound_in_one_of_twenty_runs(pairs: int) -> None:
    above = sum(math.comb(pairs, right) for right in range(pairs + 1) if right > chance_bound(pairs) * pairs)
    assert 0.02 < above / 2**pairs < 0.07


def said(settings: dict[str, Any], **changes: Any) -> str:
    out = io.StringIO()
    train(make_config({**settings, **changes}), Reporter(Console(file=out, width=1000, highlight=False)))
    return out.getvalue()


def test_a_run_that_did_not_learn_says_so_and_what_to_try(settings: dict[str, Any], tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_id_rows(tmp_path / "data" / f"{split}.jsonl", make_pairs(10))
    settings |= {"method": "dpo", "val_batches": 0}
    # So slow that rewards stay 0: none is ranked right, there or here.
    assert "Nothing was learned that holds for other pairs: of 10 test pairs" in (
        still := said(settings, learning_rate=1e-12)
    )
    assert "try `learning_rate=3e-12`" in still
    assert "Nothing was learned" not in said(settings, learning_rate=1e-2, iters=30, overwrite=True)


@pytest.mark.parametrize(("pairs", "epochs"), [(3, 3), (396, 3), (397, 1), (4000, 1)])
def test_a_small_set_is_passed_three_times(pairs: int, epochs: int) -> None:
    config = make_config({"batch_size": 4})
    assert default_epochs(config, pairs) == epochs
    assert total_steps(config, pairs) == epochs * math.ceil(pairs / 4)
    assert total_steps(make_config({"batch_size": 4, "epochs": 1}), pairs) == math.ceil(pairs / 4)


def test_the_choice_is_said(settings: dict[str, Any]) -> None:
    del settings["iters"]
    assert "9 steps, 3 epochs, as suits a set of this size" in said(settings)
