"""Headers of safetensors files and lists of shards, checked before they are believed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from orpo_mlx.errors import ModelError, reason_of
from orpo_mlx.files import read_json_table

INDEX_FILE = "model.safetensors.index.json"


class Tensor(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    """The format's own name, such as BF16."""
    shape: tuple[int, ...]


class Header(NamedTuple):
    """A safetensors header that agrees with its file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """The header of a safetensors file; no tensor is read.

    Raises:
        ModelError: it is not safetensors, is cut short, or has tensors that overlap or do not fill it.
    """
    try:
        # No tensor is read, so it does no harm that NumPy has no bfloat16.
        with safe_open(file, framework="np") as opened:
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
            tensors = {name: Tensor(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
            return Header(tensors, dict(opened.metadata() or {}))
    except SafetensorError as error:
        reason = reason_of(error).removeprefix("Error while deserializing header: ")
        raise ModelError(f"{file}: not a safetensors file, or a damaged one ({reason}); download it again.") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror or error}).") from None


def shard_names(index_file: Path) -> dict[str, str]:
    """Tensor names to file names of an index (`*.index.json`), each a plain name within the index's folder.

    Raises:
        ModelError: it has no weight_map, or names a path instead of a file beside it.
    """
    weight_map = read_json_table(index_file, ModelError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index_file}: has no weight_map, so the shards are unknown.")
    for name, shard in weight_map.items():
        # Index files come from strangers: a path would have any file on this machine opened.
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
    stored = {file.name: read_header(file).tensors for file in files}
    for name, shard in weight_map.items():
        if name not in stored[shard]:
            raise ModelError(f"{folder / shard}: tensor {name!r} is not in it, as {INDEX_FILE} says it is.")
    return files
