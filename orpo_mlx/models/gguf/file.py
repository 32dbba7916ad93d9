"""A GGUF file's metadata and tensor table, every size checked against the file before anything is read or allocated."""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orpo_mlx.errors import ModelError, reason_of

BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""Number of a tensor type to its name, numbers in a block, and bytes of a block."""
_OTHER_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


class GgufTensor(NamedTuple):
    """Where a tensor is, and as what."""

    kind: str
    """Name of its type, one of `BLOCKS`."""
    shape: tuple[int, ...]
    """Rows first; the last is the one that is contiguous."""
    start: int
    size: int
    """First byte in the file, and bytes."""


class GgufFile(NamedTuple):
    """What a GGUF file says of itself."""

    path: Path
    metadata: dict[str, Any]
    """Numbers, texts and truth values; arrays of texts are lists, arrays of numbers numpy's."""
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Metadata and tensor table of a GGUF file; no tensor is read.

    Raises:
        ModelError: it is no GGUF file, is damaged or cut short, or has a tensor of a type not known here.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(path, data))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as GGUF ({reason_of(error)}).") from None


def tensor_bytes(file: GgufFile, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a tensor, mapped and not read before somebody asks."""
    return np.memmap(file.path, np.uint8, "r", tensor.start, (tensor.size,))


class _Cursor:
    """Reads forward; nothing beyond the end, and no count that the rest of the file could not hold."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self.position, self.size = path, data, 0, len(data)

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise ModelError(
                f"{self._path}: cannot be read as GGUF (cut short: {count} bytes more at {self.position})."
            )
        self.position += count
        return self._data[self.position - count : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        found = int(self.number("<Q"))
        if found * least > self.size - self.position:
            raise ModelError(f"{self._path}: cannot be read as GGUF (states {found} items, more than it can hold).")
        return found

    def text(self) -> str:
        return self.take(self.count(1)).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 1:
            raise ModelError(f"{self._path}: cannot be read as GGUF (a value of unknown type {kind}).")
        inner = self.number("<I")
        if inner in _SCALARS:
            form = np.dtype(_SCALARS[inner])
            return np.frombuffer(self.take(self.count(form.itemsize) * form.itemsize), form)
        return [self.value(inner, depth + 1) for _ in range(self.count(8))]


def _parse(path: Path, cursor: _Cursor) -> GgufFile:
    if cursor.take(4) != b"GGUF":
        raise ModelError(f"{path}: cannot be read as GGUF (it does not begin with that word).")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ModelError(f"{path}: is GGUF of version {version}, and 2 and 3 can be read; convert it with llama.cpp.")
    tensor_count, value_count = cursor.count(24), cursor.count(13)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("<I"))
    entries = [_entry(path, cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ModelError(f"{path}: general.alignment is {alignment!r}, expected a power of two.")
    data = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, kind, shape, offset in entries:
        tensors[name] = _placed(path, name, kind, shape, data + offset, cursor.size)
    return GgufFile(path, metadata, tensors)


def _entry(path: Path, cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, dimensions = cursor.text(), cursor.number("<I")
    if dimensions > _MOST_DIMENSIONS:
        raise ModelError(f"{path}: tensor {name!r} states {dimensions} dimensions, and GGUF has at most 4.")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    return name, cursor.number("<I"), shape, cursor.number("<Q")


def _placed(path: Path, name: str, kind: int, shape: tuple[int, ...], start: int, end: int) -> GgufTensor:
    if kind not in BLOCKS:
        known = ", ".join(block[0] for block in BLOCKS.values())
        raise ModelError(
            f"{path}: tensor {name!r} is of type {_OTHER_TYPES.get(kind, kind)}, and {known} can be read; use another "
            "quantisation of this model."
        )
    label, numbers, size = BLOCKS[kind]
    if not shape or shape[-1] % numbers:
        raise ModelError(f"{path}: tensor {name!r} of type {label} has shape {shape}, no whole number of its blocks.")
    needed = prod(shape) // numbers * size
    if start + needed > end:
        raise ModelError(
            f"{path}: cut short: tensor {name!r} ends at byte {start + needed} of {end}; download the file again."
        )
    return GgufTensor(label, shape, start, needed)
