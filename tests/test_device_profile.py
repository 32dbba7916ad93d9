"""What a device wants, and how it is chosen."""

from __future__ import annotations

import mlx.core as mx
import pytest

from orpo_mlx import device_profile as module
from orpo_mlx.device_profile import CPU, FUSED_BACKWARD_SINCE, GPU, device_profile
from orpo_mlx.errors import ConfigError


@pytest.fixture(autouse=True)
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU, wherever the tests run."""
    monkeypatch.delenv("ORPO_MLX_PROFILE", raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)


def test_the_device_chooses_unless_the_environment_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_profile() == CPU
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert device_profile().name == "gpu"
    monkeypatch.setenv("ORPO_MLX_PROFILE", "cpu")
    assert device_profile() == CPU


def test_a_profile_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORPO_MLX_PROFILE", "tpu")
    with pytest.raises(ConfigError, match="ORPO_MLX_PROFILE: found 'tpu', expected one of cpu, gpu"):
        device_profile()


@pytest.mark.parametrize(("version", "native"), [((0, 31, 2), False), (FUSED_BACKWARD_SINCE, True), ((1, 0), True)])
def test_attention_is_mlxs_own_where_its_backward_pass_is_fused(
    version: tuple[int, ...], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORPO_MLX_PROFILE", "gpu")
    monkeypatch.setattr(module, "mlx_version", lambda: version)
    assert device_profile().native_attention is native
    assert device_profile().attention_rows == GPU.attention_rows >= 512


def test_kernels_that_only_metal_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORPO_MLX_PROFILE", "gpu")
    profile = device_profile()
    # This is a CPU, whatever the profile: there they run token by token, and in the logits' dtype.
    assert not profile.native_gated_delta
    assert not profile.native_cross_entropy
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for name in ("gated_delta_update", "cross_entropy"):
        monkeypatch.setattr(mx.fast, name, None, raising=False)
    assert device_profile().native_cross_entropy
    # 0.32.3 has the function, and no kernel for its backward pass.
    for version, metal in (((0, 32, 4), False), ((0, 32, 3), True), ((0, 32, 4), True)):
        monkeypatch.setattr(mx.metal, "is_available", lambda metal=metal: metal)
        monkeypatch.setattr(module, "mlx_version", lambda version=version: version)
        assert device_profile().native_gated_delta is (metal and version == (0, 32, 4))
    monkeypatch.delattr(mx.fast, "cross_entropy")
    assert not device_profile().native_cross_entropy
