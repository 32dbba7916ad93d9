"""Write a model folder: weights in shards, config, and whatever else the checkpoint came with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import make_shards
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from orpo_mlx.files import check_space, save_safetensors
from orpo_mlx.models.stored.safetensors_files import INDEX_FILE
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE

SHARD_GIB = 2
"""A shard's size: what is in memory at once, and read again if one is damaged."""
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "additional_chat_templates/*.jinja")
# Written anew, or no longer true of the converted model.
_NOT_COMPANIONS = ("config.json", ADAPTER_CONFIG_FILE, "hf_quant_config.json")


def write_weights(folder: Path, weights: dict[str, mx.array], destination: Path, *, layout: str) -> int:
    """Write `weights` as safetensors in shards with an index, and empty the dictionary on the way.

    Args:
        folder: where to.
        weights: name to array; arrays that are not computed yet are computed a shard at a time.
        destination: what `folder` is to become, for the progress bar.
        layout: "mlx" or "pt", the `format` that loaders look for in the header.

    Returns:
        Bytes of all arrays.

    Raises:
        ConfigError: not enough room on the disk; nothing is written then.
        OSError: a file cannot be written.
    """
    total = sum(array.nbytes for array in weights.values())
    check_space(folder, total)
    shards: list[dict[str, mx.array]] = make_shards(weights, SHARD_GIB)
    weights.clear()
    weight_map: dict[str, str] = {}
    count = len(shards)
    with byte_progress(f"writing {destination.name}", total) as advance:
        for number in range(count):
            # Let go of, so that each shard is freed once it is written.
            shard = shards[number]
            shards[number] = {}
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            for array in shard.values():
                # One by one: left lazy, all would be computed as the file is saved, while the bar stands still.
                mx.eval(array)
                advance(array.nbytes)
            save_safetensors(folder / name, shard, {"format": layout})
            weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, index)
    return total


def take_weights(model: nn.Module) -> dict[str, mx.array]:
    """The model's parameters by name; the model lets go of them, so that each is freed once it is written."""
    weights = dict(tree_flatten(model.parameters()))
    # An array is freed when the last reference to it is gone, and the model holds one.
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    return weights


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path, *, code: bool = False) -> list[str]:
    """Copy what lies beside the weights of a checkpoint: tokenizer, chat template, generation settings, licence.

    Args:
        source: the checkpoint's folder.
        folder: where to.
        code: also its Python files.

    Returns:
        Names of the files copied.
    """
    copied = []
    for pattern in (*_COMPANIONS, *(("*.py",) if code else ())):
        for file in sorted(source.glob(pattern)):
            name = file.relative_to(source)
            # An index of the old weights would send loaders to shards that are not there.
            if file.is_file() and str(name) not in _NOT_COMPANIONS and not file.name.endswith(".index.json"):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name)
                copied.append(str(name))
    return copied


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on stderr; yields `advance(bytes)`. Nothing is drawn where it is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        # Switched off, the bar of rich before 14.3 still prints an empty line.
        yield lambda size: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)

        def advance(size: int) -> None:
            progress.update(task, advance=size)

        yield advance
