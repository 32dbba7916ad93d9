"""Blocks of every type against values that the `gguf` package gave for them, stored."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.models.gguf.blocks import can_pack, expand, pack
from orpo_mlx.models.gguf.file import BLOCKS

STORED = json.loads((Path(__file__).parent / "stored_blocks.json").read_text())["types"]


@pytest.mark.parametrize("kind", [name for name, numbers, _ in BLOCKS.values() if numbers > 1])
def test_expanded_and_packed(kind: str) -> None:
    data = np.frombuffer(bytes.fromhex(STORED[kind]["blocks"]), np.uint8)
    expected = np.array(STORED[kind]["values"]).reshape(2, -1)
    found = np.array(expand(kind, data, expected.shape, mx.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    if can_pack(kind):
        packed, scales, biases, bits = pack(kind, data, expected.shape)
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        unpacked = mx.dequantize(packed, scales, biases, group_size=32, bits=bits)
        # Q4_K's scales are products of two numbers, rounded to half precision.
        np.testing.assert_allclose(np.array(unpacked), expected, rtol=1e-6, atol=0.1 if kind == "Q4_K" else 1e-6)


def test_plain_types() -> None:
    values = np.array([1.5, -2.25, 0.0, 3.0], np.float32)
    for kind, data in (
        ("F32", values),
        ("F16", values.astype(np.float16)),
        ("BF16", (values.view(np.uint32) >> 16).astype(np.uint16)),
    ):
        found = expand(kind, data.view(np.uint8), (2, 2), mx.float32)
        assert np.array(found.astype(mx.float32)).ravel().tolist() == values.tolist()
