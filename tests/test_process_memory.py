"""Process-wide memory settings, with stand-ins for what a Mac has."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from orpo_mlx.process_memory import clear_cache_above, configure_allocator, working_set_bytes
from tests.helpers.quiet_training import run_quietly

SIZE = {"max_recommended_working_set_size": 1000}


@pytest.mark.parametrize(
    ("info", "profile", "limits"), [({}, "gpu", []), (SIZE, "gpu", [1000, 500]), (SIZE, "cpu", [1000])]
)
def test_limits_are_set_only_where_the_device_names_a_size(
    info: dict[str, int], profile: str, limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORPO_MLX_PROFILE", profile)
    found: list[int] = []
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", found.append)
    monkeypatch.setattr(mx, "set_cache_limit", found.append)
    configure_allocator()
    assert found == limits
    assert working_set_bytes() == (limits[0] if limits else None)


@pytest.mark.parametrize(("threshold", "cleared"), [(None, False), (10**9, False), (0, True)])
def test_the_cache_is_cleared_where_it_has_grown_past_the_threshold(threshold: int | None, cleared: bool) -> None:
    mx.clear_cache()
    mx.eval(mx.ones((1000, 1000)) + 1)
    kept = mx.get_cache_memory()
    assert kept > 0
    clear_cache_above(threshold)
    assert mx.get_cache_memory() == (0 if cleared else kept)


@pytest.mark.parametrize(("info", "limits"), [({}, []), ({"max_recommended_working_set_size": 7}, [7])])
def test_memory_is_wired_only_where_the_device_names_a_size(
    info: dict[str, int], limits: list[int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", found.append)
    monkeypatch.setattr(mx, "set_cache_limit", lambda _: None)
    run_quietly({**settings, "iters": 1})
    assert found == limits
