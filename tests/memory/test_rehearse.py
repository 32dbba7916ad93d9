"""A run that is only looked at says what it comes to, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_mlx.cli.train import main
from orpo_mlx.config.checks import make_config
from orpo_mlx.errors import ConfigError
from orpo_mlx.memory.rehearse import Course, rehearse, spoken
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.training.distributed import Ranks
from tests.conftest import make_pairs
from tests.helpers.kill_and_resume import records
from tests.helpers.quiet_training import flags, run_quietly


@pytest.mark.parametrize("method", ["orpo", "dpo"])
def test_steps_and_tokens_are_those_of_the_run(settings: dict[str, Any], method: str) -> None:
    settings |= {"method": method, "iters": 6, "steps_per_eval": 2}
    course = rehearse(make_config(settings), Reporter(Console(quiet=True)), Ranks())
    folder = Path(settings["adapter_path"])
    assert not folder.exists()
    run_quietly(settings)
    assert course.steps == max(row["step"] for row in records(folder))
    # Two epochs of six pairs, two a step.
    assert course.tokens == 2 * sum(pair.pair_tokens for pair in make_pairs(6, seed=0))
    assert course.step_seconds > 0
    assert course.evaluation_seconds > 0
    assert course.seconds == 6 * course.step_seconds + course.evaluation_seconds


def test_the_command(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    argv = [word for word in flags({**settings, "val_batches": 0, "test_batches": 0}) if word != "--no-memory-check"]
    assert main([*argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Predicted peak" in out
    assert "3 steps of 2 pairs, " in out
    assert "of which evaluations 0 s. Nothing was kept:" in out
    assert not Path(settings["adapter_path"]).exists()
    with pytest.raises(ConfigError, match="`dry_run` looks at a run from its beginning"):
        make_config({"dry_run": True, "resume": True})


def test_times_as_one_says_them() -> None:
    assert [spoken(seconds) for seconds in (0.2, 89, 90, 5400, 36_000)] == [
        "0 s",
        "89 s",
        "2 min",
        "1 h 30 min",
        "10 h 0 min",
    ]
    assert Course(2, 10, 3.0, 4.0).seconds == 10
