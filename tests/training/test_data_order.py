"""How many steps a run takes, and which pairs each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.config.checks import make_config
from orpo_mlx.errors import ConfigError
from orpo_mlx.training.data_order import total_steps
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.step import optimiser_step
from tests.helpers.quiet_training import run_quietly


def test_steps_of_a_run() -> None:
    assert total_steps(make_config({"iters": 7}), 100) == 7
    assert total_steps(make_config({"epochs": 1}), 10) == 3
    assert total_steps(make_config({"epochs": 1.5, "batch_size": 2, "grad_accumulation_steps": 2}), 8) == 3
    for epochs in (1.7e308, 1e19):
        with pytest.raises(ConfigError, match=r"^`epochs`: found 1.*e\+.*, expected passes of fewer than 2\^63 steps"):
            total_steps(make_config({"epochs": epochs}), 100)


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_order_is_saved_with_the_adapters_and_restored(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    seen: list[list[str]] = []
    step = optimiser_step

    def recorded(run: Run, pairs: Any, number: int) -> Any:
        if interrupted and len(seen) == 2:
            raise KeyboardInterrupt
        seen.append([pair.location for pair in pairs])
        return step(run, pairs, number)

    monkeypatch.setattr("orpo_mlx.training.loop.optimiser_step", recorded)
    run_quietly({**settings, "iters": 8, "adapter_path": str(tmp_path / "whole")}) if not interrupted else None
    whole, seen[:] = list(seen), []
    first = {**settings, "adapter_path": str(tmp_path / "first"), "iters": 2}
    stopped = interrupted
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            run_quietly({**first, "iters": 8})
        interrupted = False
    else:
        run_quietly(first)
    run_quietly({**settings, "iters": 6, "resume_adapter_file": str(tmp_path / "first")})
    # 6 pairs, 2 a step: two and two thirds epochs, each pair once in each of the whole ones.
    assert [len({location for step in seen[start : start + 3] for location in step}) for start in (0, 3)] == [6, 6]
    if stopped:
        return
    assert seen == whole
    resumed, seen[:] = list(seen), []
    run_quietly({**settings, "iters": 2, "seed": 5, "resume_adapter_file": str(tmp_path / "first")})
    fresh, seen[:] = list(seen), []
    run_quietly({**settings, "iters": 2, "seed": 5})
    assert fresh == seen
    assert len(resumed) == 8
    # In place, over the file it goes on from, with a save at every step.
    seen.clear()
    for _ in range(2):
        run_quietly(
            {**first, "save_every": 1, "iters": 2, "overwrite": True, "resume_adapter_file": str(tmp_path / "first")}
        )
    assert seen == resumed[2:6]
