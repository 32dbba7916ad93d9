"""Every question that Python asks about the device is answered as on a GPU; MLX computes on the CPU all the same.

As a plugin it holds for the whole suite: `python -m pytest -p tests.helpers.as_on_a_gpu`.
"""

from __future__ import annotations

from typing import Any

import pytest

# isort: off
import orpo_mlx  # noqa: F401  (first, so that a fast BLAS is loaded before MLX)
import mlx.core as mx
# isort: on

MAC = {
    "architecture": "applegpu_g14s",
    "device_name": "Apple M2 Max",
    "max_buffer_length": 22_906_503_168,
    "max_recommended_working_set_size": 22_906_503_168,
    "memory_size": 34_359_738_368,
    "resource_limit": 499_000,
}


def answer_as_a_gpu(patch: pytest.MonkeyPatch, *, metal: bool) -> None:
    """With `metal`, a Mac's; without, one that has none of Metal's kernels."""
    patch.delenv("ORPO_MLX_PROFILE", raising=False)
    default = [mx.Device(mx.gpu)]
    streams = {name: getattr(mx, name) for name in ("new_stream", "new_thread_local_stream")}
    for name, make in streams.items():
        patch.setattr(mx, name, lambda device, make=make: make(mx.Device(mx.cpu)))
    patch.setattr(mx, "default_device", lambda: default[0])
    patch.setattr(mx, "set_default_device", lambda device: default.__setitem__(0, _device(device)))
    patch.setattr(mx.metal, "is_available", lambda: metal)
    if metal:
        patch.setattr(mx, "device_info", lambda *_: MAC)
        patch.setattr(mx, "set_wired_limit", lambda _: 0)


def _device(device: Any) -> mx.Device:
    return device if isinstance(device, mx.Device) else mx.Device(device)


def pytest_configure(config: pytest.Config) -> None:
    """For the whole session, where this is a plugin."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    answer_as_a_gpu(patch, metal=False)


def pytest_itemcollected(item: pytest.Item) -> None:
    """One test asks MLX itself, which has a CPU."""
    if item.name == "test_nothing_is_compiled_on_the_cpu":
        item.add_marker(pytest.mark.skip(reason="MLX's own default device is a CPU"))
