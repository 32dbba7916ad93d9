"""What `--memory` chooses between."""

from __future__ import annotations

from orpo_mlx.modes import AUTOMATIC, MODES


def test_modes_get_smaller_one_after_another() -> None:
    kept = [mode.kept_layers for mode in MODES.values() if mode.lean]
    assert kept == sorted(kept, reverse=True)
    assert tuple(name for name, mode in MODES.items() if mode.lean) == AUTOMATIC
