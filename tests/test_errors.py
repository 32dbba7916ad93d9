"""What is said of errors that MLX raises over the GPU and its memory."""

from __future__ import annotations

import re

import pytest

from orpo_mlx.errors import DeviceError, device_advice, naming_device_errors

IGNORED = (
    "[METAL] Command buffer execution failed: Ignored (for causing prior/excessive GPU errors) "
    "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)."
)
OUT_OF_MEMORY = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
)
TIMEOUT = (
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
    "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
)
IMPACTING = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        (OUT_OF_MEMORY, "memory has run out: lower `micro_batch_tokens`"),
        (TIMEOUT, "too long: lower `micro_batch_tokens`"),
        (IMPACTING, "set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"),
        (IGNORED, "no more work of this process: start the command again"),
        (
            "[METAL] Command buffer execution failed: Internal Error (0000000a:kIOGPU).",
            "the GPU failed: start the command again",
        ),
        ("[malloc] Unable to allocate 7 bytes.", "memory cannot be had: lower `micro_batch_tokens`"),
        ("[metal::malloc] Attempting to allocate 9 bytes which is greater than 8.", "memory cannot be had"),
        ("[metal::malloc] Resource limit (499000) exceeded.", "too many arrays: start the command again"),
    ],
)
def test_advice_goes_by_the_code(said: str, advice: str) -> None:
    assert advice in (device_advice(RuntimeError(said)) or "")
    with pytest.raises(DeviceError, match=re.escape(advice)), naming_device_errors():
        raise RuntimeError(said)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^no such kernel$"), naming_device_errors():
        raise RuntimeError("no such kernel")
