"""A GGUF file's metadata and tensor table, every size checked against the file before anything is read or allocated."""

from __future__ import annotations

import mmap
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orpo_mlx.errors import ModelError, reason_of


class Block(NamedTuple):
    """How a tensor type stores its numbers."""

    name: str
    numbers: int
    """In a block."""
    size: int
    """Bytes of a block."""


BLOCKS = {
    0: Block("F32", 1, 4),
    1: Block("F16", 1, 2),
    2: Block("Q4_0", 32, 18),
    3: Block("Q4_1", 32, 20),
    6: Block("Q5_0", 32, 22),
    7: Block("Q5_1", 32, 24),
    8: Block("Q8_0", 32, 34),
    12: Block("Q4_K", 256, 144),
    13: Block("Q5_K", 256, 176),
    14: Block("Q6_K", 256, 210),
    30: Block("BF16", 1, 2),
}
"""The tensor types that can be read, by their number in the file."""

# ggml's tensor types by number, to name those that cannot be read.
_TYPE_NAMES = (
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL "
    "IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 "
    "IQ4_NL_8_8 MXFP4"
)
# Types of metadata values by number, as `struct` writes them; the file is little-endian.
# 8 and 9 are left out: texts and arrays, whose sizes differ.
_SCALARS = {number: f"<{form}" for number, form in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)}
_STRING = 8
_ARRAY = 9
_MOST_DIMENSIONS = 4


class GgufTensor(NamedTuple):
    """Where a tensor is, and as what."""

    kind: str
    """Name of its type, one of `BLOCKS`."""
    shape: tuple[int, ...]
    """Rows first; the last is the one that is contiguous."""
    start: int
    """Its first byte in the file."""
    size: int
    """Bytes."""


class TableEntry(NamedTuple):
    """What the tensor table says of one tensor, not checked yet."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int
    """Its first byte, counted from where the tensors begin."""


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
        found = path.stat()
        # Size and time are part of the cache's key, so that a file changed in place is read again.
        return _parsed(path, found.st_size, found.st_mtime_ns)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as GGUF ({reason_of(error)}).") from None


@lru_cache(maxsize=1)
def _parsed(path: Path, size: int, changed_ns: int) -> GgufFile:
    """`read_gguf` once for a file as it is: its tokenizer, its config and its weights are asked for one by one, and a
    vocabulary takes a second."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return parse_gguf(path, Cursor(path, data))


def tensor_bytes(file: GgufFile, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a tensor, mapped and not read before somebody asks."""
    return np.memmap(file.path, np.uint8, "r", tensor.start, (tensor.size,))


class Cursor:
    """Reads forward; nothing beyond the end, and no count that the rest of the file could not hold."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self.position = 0
        self.size = len(data)

    def take(self, count: int) -> bytes:
        """The next so many bytes."""
        if count > self.size - self.position:
            raise ModelError(
                f"{self._path}: cannot be read as GGUF (cut short: {count} bytes more at {self.position})."
            )
        self.position += count
        return self._data[self.position - count : self.position]

    def number(self, form: str) -> Any:
        """The next number, of a form as `struct` writes it."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        found = int(self.number("<Q"))
        if found * least > self.size - self.position:
            raise ModelError(f"{self._path}: cannot be read as GGUF (states {found} items, more than it can hold).")
        return found

    def text(self) -> str:
        """The next string, its length before it."""
        return self.take(self.count(1)).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """The next value, of the type with that number."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        # Arrays of arrays of numbers are as deep as any known file goes; a hostile one could nest until Python fails.
        if kind != _ARRAY or depth > 1:
            raise ModelError(f"{self._path}: cannot be read as GGUF (a value of unknown type {kind}).")
        inner = self.number("<I")
        if inner in _SCALARS:
            form = np.dtype(_SCALARS[inner])
            return np.frombuffer(self.take(self.count(form.itemsize) * form.itemsize), form)
        # A text takes 8 bytes at least, for its length; an array takes more.
        return [self.value(inner, depth + 1) for _ in range(self.count(8))]


def parse_gguf(path: Path, cursor: Cursor) -> GgufFile:
    """`read_gguf` on the file's bytes."""
    if cursor.take(4) != b"GGUF":
        raise ModelError(f"{path}: cannot be read as GGUF (it does not begin with that word).")
    version = cursor.number("<I")
    # Version 1 has counts and lengths of 32 bits, where 64 are read here.
    if version not in (2, 3):
        raise ModelError(f"{path}: is GGUF of version {version}, and 2 and 3 can be read; convert it with llama.cpp.")
    # An entry has at least so many bytes: lengths, type and offset of a tensor; length and type of a value.
    tensor_count = cursor.count(24)
    value_count = cursor.count(13)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("<I"))
    entries = [_read_entry(path, cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ModelError(f"{path}: general.alignment is {alignment!r}, expected a power of two.")
    data = -(-cursor.position // alignment) * alignment
    return GgufFile(path, metadata, {entry.name: located(path, entry, data, cursor.size) for entry in entries})


def _read_entry(path: Path, cursor: Cursor) -> TableEntry:
    """The next entry of the tensor table."""
    name = cursor.text()
    dimensions = cursor.number("<I")
    if dimensions > _MOST_DIMENSIONS:
        raise ModelError(f"{path}: tensor {name!r} states {dimensions} dimensions, and GGUF has at most 4.")
    # GGUF counts from the contiguous dimension.
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    return TableEntry(name, shape, cursor.number("<I"), cursor.number("<Q"))


def located(path: Path, entry: TableEntry, data: int, end: int) -> GgufTensor:
    """A tensor whose bytes are within the file.

    Args:
        path: the file, for errors.
        entry: what the table says.
        data: where the tensors begin.
        end: where the file ends.

    Raises:
        ModelError: its type cannot be read, its shape does not fit the type, or the file ends before it.
    """
    if entry.type_number not in BLOCKS:
        names = dict(enumerate(_TYPE_NAMES.split()))
        found = names.get(entry.type_number, entry.type_number)
        known = ", ".join(block.name for block in BLOCKS.values())
        raise ModelError(
            f"{path}: tensor {entry.name!r} is of type {found}, and {known} can be read; use another quantisation of "
            "this model."
        )
    block = BLOCKS[entry.type_number]
    if not entry.shape or entry.shape[-1] % block.numbers:
        raise ModelError(
            f"{path}: tensor {entry.name!r} of type {block.name} has shape {entry.shape}, no whole number of its "
            "blocks."
        )
    size = prod(entry.shape) // block.numbers * block.size
    start = data + entry.offset
    if start + size > end:
        raise ModelError(
            f"{path}: cut short: tensor {entry.name!r} ends at byte {start + size} of {end}; download the file again."
        )
    return GgufTensor(block.name, entry.shape, start, size)
