"""What `--memory` chooses between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from orpo_mlx.engine.modes import AUTOMATIC, MODES
from tests.helpers.quiet_training import rows, run_quietly


def test_modes_get_smaller_one_after_another() -> None:
    kept = [mode.kept_layers for mode in MODES.values() if mode.lean]
    assert kept == sorted(kept, reverse=True)
    assert tuple(name for name, mode in MODES.items() if mode.lean) == AUTOMATIC


def test_only_the_fastest_keeps_more_attention_weights() -> None:
    first, *others = (MODES[name].kept_attention_mib for name in AUTOMATIC)
    assert all(first > other for other in others)


@pytest.mark.parametrize("method", ["orpo", "dpo"])
def test_gradient_checkpointing_changes_memory_not_numbers(settings: dict[str, Any], method: str) -> None:
    losses = []
    for flag in (False, True, False):
        run_quietly({**settings, "method": method, "grad_checkpoint": flag})
        losses.append([row["loss"] for row in rows(settings)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[2] == losses[0]
