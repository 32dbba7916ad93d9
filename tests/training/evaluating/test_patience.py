"""A run that no longer gets better ends, as after its last step, and is resumed as what it is."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.config.checks import make_config
from orpo_mlx.errors import ConfigError, UserError
from orpo_mlx.training.evaluating.patience import Patience
from orpo_mlx.training.prepare import require_accuracy
from tests.helpers.kill_and_resume import metrics
from tests.helpers.quiet_training import make_run, rows, run_quietly
from tests.training.checkpoints.test_resume import assert_same, whole_and_resumed

# Nothing changes, so nothing is better than the first validation.
STILL = {
    "iters": 20,
    "steps_per_eval": 2,
    "save_every": 3,
    "steps_per_report": 4,
    "learning_rate": 1e-12,
    "patience": 2,
}


@pytest.mark.parametrize(
    ("measure", "values", "waited"),
    [
        ("loss", [3.0, 2.0, 2.0, 2.5, 1.9, math.nan], [0, 0, 1, 2, 0, 1]),
        ("accuracy", [0.5, 0.5, 0.6, 0.4], [0, 1, 0, 1]),
        ("loss", [math.nan, math.inf, 1.0], [1, 2, 0]),
    ],
)
def test_it_counts_validations_that_are_no_better(measure: str, values: list[float], waited: list[int]) -> None:
    state, found = Patience(), []
    for number, value in enumerate(values):
        step = 2 * (number + 1)
        state = state.after(step, {"loss": value, "rewards/accuracies": value}, measure)
        found.append(state.waited)
        assert state.after(step, {"loss": 9.0, "rewards/accuracies": 0.0}, measure) == state
        assert Patience.from_json(state._asdict()) == state
    assert found == waited
    # What is the best of one measure is nothing to another.
    other = {"loss": "accuracy", "accuracy": "loss"}[measure]
    assert state.after(99, {"loss": 9.0, "rewards/accuracies": 0.0}, other).waited == 0


@pytest.mark.parametrize("measure", ["loss", "accuracy"])
def test_a_run_ends_by_itself(settings: dict[str, Any], measure: str) -> None:
    after = run_quietly({**settings, **STILL, "patience_on": measure})
    assert set(after) == {"valid", "test"}
    assert [row["step"] for row in rows(settings, "test")][-1] == 6
    assert rows(settings, "train")[-1]["step"] == 6
    # It is finished: another run may take its place, and resuming it trains no further.
    assert run_quietly({**settings, **STILL, "patience_on": measure, "resume": True}) == after
    assert rows(settings, "train")[-1]["step"] == 6
    run_quietly({**settings, "iters": 1})


def test_a_larger_patience_goes_on(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    whole = str(Path(settings["adapter_path"]).with_name("whole"))
    run_quietly({**settings, **STILL, "patience": 3, "adapter_path": whole})
    run_quietly({**settings, **STILL})
    again = ["--resume", "--adapter-path", settings["adapter_path"]]
    assert main(again) == 0
    assert "The run ended by itself after step 6 (--patience 2), and trains no further" in capsys.readouterr().out
    assert main([*again, "--patience", "3"]) == 0
    assert "ended by itself" not in capsys.readouterr().out
    assert_same(Path(whole), Path(settings["adapter_path"]))
    # Without any it goes on to its last step.
    run_quietly({**settings, **{**STILL, "patience": None, "iters": 10}, "resume": True})
    assert rows(settings, "train")[-1]["step"] == 10


def test_resumed_it_is_the_run_it_would_have_been(settings: dict[str, Any], tmp_path: Path) -> None:
    whole, broken = whole_and_resumed({**settings, **STILL}, tmp_path, [5])
    assert_same(whole, broken)
    assert metrics(broken)[-1]["step"] == 6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"patience": 2, "val_batches": 0}, "`patience` goes by the validation loss"),
        ({"patience_on": "accuracy"}, "`patience_on` says what `patience` goes by"),
    ],
)
def test_what_would_do_nothing_is_refused(settings: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make_run({**settings, **changes})


@pytest.mark.parametrize(("val_batches", "refused"), [(1, True), (2, False), (-1, False)])
def test_an_accuracy_that_the_evaluated_rows_lack_is_refused(val_batches: int, refused: bool) -> None:
    groups = SimpleNamespace(counts=np.array([1, 1, 2]))
    splits: Any = {"valid": SimpleNamespace(pairs=SimpleNamespace(groups=groups))}
    own = {"method": "sft", "batch_size": 2, "val_batches": val_batches, "patience": 2, "patience_on": "accuracy"}
    with pytest.raises(ConfigError, match="give `patience_on=loss`") if refused else nullcontext():
        require_accuracy(make_config(own), splits)
