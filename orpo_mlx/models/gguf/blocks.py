"""GGUF's blocks of quantised numbers: expanded, or packed anew as MLX's quantised layers hold them.

A block is q · scale + offset for whole numbers q, with one scale and offset for every 16 or 32 of them, after the
public description of the format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from orpo_mlx.models.gguf.file import BLOCKS

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
_GROUP = 32
_SIZES = {block.name: block.size for block in BLOCKS.values()}
# Types that mx.load keeps quantised when it reads a GGUF file itself.
_MLX_READS = ("Q4_0", "Q4_1", "Q8_0")


class Packed(NamedTuple):
    """A matrix as MLX's quantised layers hold it, in groups of 32."""

    weight: mx.array
    """(rows, columns · bits / 32) uint32."""
    scales: mx.array
    """(rows, columns / 32) float16."""
    biases: mx.array
    """(rows, columns / 32) float16."""
    bits: int


class Groups(NamedTuple):
    """N blocks taken apart: their numbers are quants · scales + offsets."""

    quants: np.ndarray[Any, Any]
    """(N, G, size of a group): whole numbers from 0, in order."""
    scales: Floats
    """(N, G)."""
    offsets: Floats
    """(N, G)."""
    bits: int


def expand(kind: str, data: Bytes, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A tensor as floating point: those types as they are, quantised ones computed in float32 and rounded to `dtype`.

    To float16, the types that MLX's own reader knows are expanded as its quantised layers expand them, in float16, so
    that a model is the same whether it is run quantised or not.

    Args:
        kind: name of the tensor's type.
        data: its bytes.
        shape: its shape.
        dtype: of quantised tensors once expanded.
    """
    if kind == "BF16":
        return mx.array(data.view(np.uint16)).view(mx.bfloat16).reshape(shape)
    if kind in ("F32", "F16"):
        return mx.array(data.view(np.float32 if kind == "F32" else np.float16)).reshape(shape)
    if dtype == mx.float16 and kind in _MLX_READS:
        packed = pack(kind, data, shape)
        return mx.dequantize(packed.weight, packed.scales, packed.biases, group_size=_GROUP, bits=packed.bits)
    groups = take_apart(kind, data)
    numbers = groups.quants.astype(np.float32) * groups.scales[..., None] + groups.offsets[..., None]
    return mx.array(numbers.reshape(shape)).astype(dtype)


def can_pack(kind: str) -> bool:
    """Whether MLX's quantised layers can hold blocks of this type: 4 or 8 bits in groups of 32."""
    return kind in ("Q4_0", "Q4_1", "Q4_K", "Q8_0")


def pack(kind: str, data: Bytes, shape: tuple[int, ...]) -> Packed:
    """A tensor as MLX's quantised layers hold it: the whole numbers unchanged, scales and offsets in float16."""
    groups = take_apart(kind, data)
    per_word = 32 // groups.bits
    # The first number in the lowest bits, as mx.quantize packs them.
    shifted = groups.quants.reshape(-1, per_word).astype(np.uint32) << (
        np.arange(per_word, dtype=np.uint32) * groups.bits
    )
    packed = np.bitwise_or.reduce(shifted, axis=1).astype(np.uint32)
    small = (*shape[:-1], shape[-1] // _GROUP)
    scales, biases = (mx.array(part.astype(np.float16)).reshape(small) for part in (groups.scales, groups.offsets))
    return Packed(mx.array(packed).reshape(*shape[:-1], shape[-1] // per_word), scales, biases, groups.bits)


def take_apart(kind: str, data: Bytes) -> Groups:
    """The blocks of a quantised type."""
    return _READERS[kind](np.ascontiguousarray(data.reshape(-1, _SIZES[kind])))


def half(blocks: Bytes, start: int) -> Floats:
    """(N, 1): the float16 at byte `start` of each block."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def nibbles(data: Bytes) -> Bytes:
    """(N, 16 bytes) to (N, 1, 32): low halves first, then high ones."""
    return np.concatenate([data & 15, data >> 4], axis=1)[:, None, :]


def fifth_bits(data: Bytes) -> Bytes:
    """(N, 4 bytes) to (N, 1, 32): a bit of each, moved to the fifth place."""
    bits: Bytes = (np.unpackbits(data, axis=1, bitorder="little") << np.uint8(4))[:, None, :]
    return bits


# One function a type: bytes of N blocks, (N, size of a block), to their groups. Types that end in _0 store no minimum:
# their numbers are signed, and the offset moves the middle of the range to 0.
def q4_0(blocks: Bytes) -> Groups:
    scale = half(blocks, 0)
    # Layout in bytes: scale 2, numbers 16.
    return Groups(nibbles(blocks[:, 2:]), scale, -8 * scale, 4)


def q4_1(blocks: Bytes) -> Groups:
    # Scale 2, minimum 2, numbers 16.
    return Groups(nibbles(blocks[:, 4:]), half(blocks, 0), half(blocks, 2), 4)


def q5_0(blocks: Bytes) -> Groups:
    scale = half(blocks, 0)
    # Scale 2, fifth bits 4, low nibbles 16.
    return Groups(nibbles(blocks[:, 6:]) | fifth_bits(blocks[:, 2:6]), scale, -16 * scale, 5)


def q5_1(blocks: Bytes) -> Groups:
    # Scale 2, minimum 2, fifth bits 4, low nibbles 16.
    quants = nibbles(blocks[:, 8:]) | fifth_bits(blocks[:, 4:8])
    return Groups(quants, half(blocks, 0), half(blocks, 2), 5)


def q8_0(blocks: Bytes) -> Groups:
    scale = half(blocks, 0)
    # Scale 2, signed numbers 32. MLX packs whole numbers from 0: they are moved by 128, and the offset moves them back.
    quants = (blocks[:, 2:].view(np.int8).astype(np.int16) + 128).astype(np.uint8)[:, None, :]
    return Groups(quants, scale, -128 * scale, 8)


def six_bit_pairs(packed: Bytes) -> tuple[Floats, Floats]:
    """(N, 12 bytes) to 8 scales and 8 minima of 6 bits: four of each in the low bits, the rest in pieces."""
    first = packed[:, :4]
    second = packed[:, 4:8]
    third = packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def k_halves(data: Bytes) -> Bytes:
    """(N, 128 bytes) to (N, 8, 32): each 32 bytes hold two groups, in their low and high halves."""
    parts = data.reshape(-1, 4, 1, 32)
    return np.concatenate([parts & 15, parts >> 4], axis=2).reshape(-1, 8, 32)


def q4_k(blocks: Bytes) -> Groups:
    scales, minima = six_bit_pairs(blocks[:, 4:16])
    # A block of 256: scale 2 and minimum 2 for all, 12 bytes of scales and minima of 8 groups in 6 bits, nibbles 128.
    return Groups(k_halves(blocks[:, 16:]), half(blocks, 0) * scales, -half(blocks, 2) * minima, 4)


def q5_k(blocks: Bytes) -> Groups:
    scales, minima = six_bit_pairs(blocks[:, 4:16])
    # As q4_k, with 32 bytes of fifth bits before the nibbles: bit i of byte j belongs to number j of group i.
    bits = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    quants = k_halves(blocks[:, 48:]) | (bits << 4)
    return Groups(quants, half(blocks, 0) * scales, -half(blocks, 2) * minima, 5)


def q6_k(blocks: Bytes) -> Groups:
    # A block of 256: low nibbles 128, two high bits of each 64, 16 signed scales, then a scale 2 for all. Two halves of
    # 128 numbers, in four rows of 32.
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    quants = (low | ((high & 3) << 4)).reshape(-1, 16, 16)
    scales = half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return Groups(quants, scales, -32 * scales, 6)


_READERS: dict[str, Callable[[Bytes], Groups]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}
