"""Which mode a run takes by itself."""

from __future__ import annotations

import pytest

from orpo_mlx import modes
from orpo_mlx.lora import add_adapters
from orpo_mlx.modes import MODES, choose_memory
from tests.conftest import make_model

# Two layers of 12·32 + 6·48 numbers of 4 bytes.
PER_TOKEN = 2 * 4 * (12 * 32 + 6 * 48)


@pytest.mark.parametrize(
    ("share", "mode"), [(1.3, "fast"), (1.24, "balanced"), (0.63, "balanced"), (0.61, "thrift"), (0.01, "thrift")]
)
def test_the_fastest_that_fits(share: float, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    # Enough tokens that the weights hardly count; balanced keeps a whole layer of the two at least.
    monkeypatch.setattr(modes, "working_set_bytes", lambda: int(share * 10**6 * PER_TOKEN))
    assert choose_memory(model, 10**6) == mode


def test_without_a_working_set_half_the_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "working_set_bytes", lambda: None)
    assert choose_memory(make_model(), 1) == "fast"
    assert choose_memory(make_model(), 10**12) == "thrift"


def test_modes_get_smaller_one_after_another() -> None:
    kept = [mode.kept_layers for mode in MODES.values() if mode.lean]
    assert kept == sorted(kept, reverse=True)
