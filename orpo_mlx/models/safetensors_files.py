"""Safetensors headers and lists of shards, checked before they are believed."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.errors import ModelError, reason_of

INDEX_FILE = "model.safetensors.index.json"
ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
}
_MOST_HEADER = 100_000_000  # Bytes; the reference implementation's bound.
_MOST_JSON = 100_000_000


class Tensor(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    end: int


class Header(NamedTuple):
    """A safetensors header whose every tensor lies within the file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """The header of a safetensors file: 8 bytes of length, then JSON; no tensor is read.

    Raises:
        ModelError: it is not safetensors, or its header and its size do not agree.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, _MOST_HEADER):
                raise ModelError(
                    f"{file}: not a safetensors file, or cut short (it states a header of {length} bytes and has "
                    f"{size} in all); download it again."
                )
            header = json.loads(stream.read(length))
    except (ValueError, RecursionError):
        raise ModelError(f"{file}: not a safetensors file (its header is not JSON); download it again.") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}).") from None
    if not isinstance(header, dict):
        raise ModelError(f"{file}: not a safetensors file (its header is not a table); download it again.")
    metadata = header.pop("__metadata__", None) or {}
    tensors = {name: _tensor(file, name, entry) for name, entry in header.items()}
    _check_layout(file, tensors, size - 8 - length)
    return Header(tensors, {str(key): str(value) for key, value in dict(metadata).items()})


def _tensor(file: Path, name: str, entry: Any) -> Tensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        fits = whole and (end - start) * 8 == prod(shape) * ITEM_BITS[dtype]
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ModelError(
            f"{file}: tensor {name!r} has a dtype, shape and offsets that do not agree; download the file again."
        )
    return Tensor(dtype, tuple(shape), start, end)


def _check_layout(file: Path, tensors: dict[str, Tensor], room: int) -> None:
    spans = sorted((tensor.start, tensor.end, name) for name, tensor in tensors.items())
    for start, end, name in spans:
        if end > room:
            raise ModelError(
                f"{file}: cut short: tensor {name!r} ends at byte {end} of {room} (starting at {start}); "
                "download the file again."
            )
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise ModelError(f"{file}: tensors {name!r} and {other!r} share bytes, which safetensors does not allow.")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON table from a file of reasonable size.

    Raises:
        ModelError: it is missing, too large, not JSON, or not a table.
    """
    try:
        if file.stat().st_size > _MOST_JSON:
            raise ModelError(f"{file}: {file.stat().st_size} bytes is no JSON settings file.")
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file.") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({reason_of(error, first_line=True)}).") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds a {type(value).__name__}, expected a table.")
    return value


def shard_names(index_file: Path) -> dict[str, str]:
    """Tensor names to file names of an index (`*.index.json`), each a plain name within the index's folder.

    Raises:
        ModelError: it has no weight_map, or names a path instead of a file beside it.
    """
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index_file}: has no weight_map, so the shards are unknown.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise ModelError(
                f"{index_file}: tensor {name!r} is said to be in {shard!r}, which is not a file name within the folder."
            )
    return dict(weight_map)


def safetensors_shards(folder: Path) -> list[Path]:
    """The weight files of a model folder, by its index where it has one, with every header checked; empty without any.

    Raises:
        ModelError: a shard is missing or damaged, or does not hold what the index says.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        files = sorted(folder.glob("model*.safetensors"))
        for file in files:
            read_header(file)
        return files
    weight_map = shard_names(index)
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{folder}: {', '.join(missing[:3])} of {len(files)} weight files is missing; download the model again."
        )
    held = {file.name: read_header(file).tensors for file in files}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise ModelError(f"{folder / shard}: tensor {name!r} is not in it, as {INDEX_FILE} says it is.")
    return files
