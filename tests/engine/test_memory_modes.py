"""What `--memory` chooses between."""

from __future__ import annotations

from orpo_mlx.engine.modes import AUTOMATIC, MODES


def test_modes_get_smaller_one_after_another() -> None:
    kept = [mode.kept_layers for mode in MODES.values() if mode.lean]
    assert kept == sorted(kept, reverse=True)
    assert tuple(name for name, mode in MODES.items() if mode.lean) == AUTOMATIC


def test_only_the_fastest_keeps_more_attention_weights() -> None:
    first, *others = (MODES[name].kept_attention_mib for name in AUTOMATIC)
    assert all(first > other for other in others)
