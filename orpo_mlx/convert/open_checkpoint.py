"""Open a checkpoint in Hugging Face layout for conversion: every file checked, its weights not read yet."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from orpo_mlx.errors import ModelError, reason_of
from orpo_mlx.files import check_space, read_json_table, save_safetensors
from orpo_mlx.models.loading import ModelInfo, find, load_lazily, locate
from orpo_mlx.models.stored.hf_config import normalise_config
from orpo_mlx.models.stored.safetensors_files import read_header, safetensors_shards, shard_names
from orpo_mlx.models.stored.tied_head import settle_tie

# How pickled weights are called, by transformers, PyTorch and Meta.
_PICKLED = ("pytorch_model*.bin", "model*.bin", "*.pt", "*.pth", "consolidated*.pth")


class SourceModel(NamedTuple):
    """A model that can be loaded and converted, in any layout."""

    info: ModelInfo
    """To load it with; its path is the folder its safetensors are in."""
    folder: Path
    """The folder or file it came from."""
    config: dict[str, Any]
    """All of its config.json, with settings where mlx-lm looks for them as well; empty where it is a GGUF file."""
    files: list[Path]
    """Its safetensors; empty where it is a GGUF file."""

    def tensor_names(self) -> set[str]:
        """The checkpoint's tensor names, as Hugging Face's."""
        if not self.files:
            model, _ = load_lazily(self.info)
            return set(dict(tree_flatten(model.parameters())))
        return {name for file in self.files for name in read_header(file).tensors}


def open_checkpoint(name: str, scratch: Path, *, source: str, trust_remote_code: bool = False) -> SourceModel:
    """Find a checkpoint in Hugging Face layout and check its settings and weight files.

    Args:
        name: Hub id or folder.
        scratch: a folder to make and use where the weights cannot be loaded from where they are.
        source: what the user gave `name` with, for errors.
        trust_remote_code: allow Python code that comes with the checkpoint to run.

    Raises:
        ModelError: it cannot be found or used, or is damaged.
    """
    folder, _ = locate(name, source)
    if folder.is_file():
        raise ModelError(f"{folder}: is a GGUF file, expected a folder; use the gguf command for it.")
    raw = read_json_table(folder / "config.json", ModelError)
    config = raw if "model_file" in raw else settle_tie(normalise_config(raw, str(folder / "config.json")), folder)
    files = safetensors_shards(folder)
    info = find(str(folder), trust_remote_code=trust_remote_code, source=source)
    if not files:
        files = unpickled(folder, scratch)
        info = info._replace(path=scratch)
    elif set(files) != set(folder.glob("model*.safetensors")):
        # mlx-lm takes every model*.safetensors and nothing else, whatever the index says.
        link_files(folder, files, scratch)
        info = info._replace(path=scratch)
    return SourceModel(info, folder, config, files)


def open_model(name: str, scratch: Path, *, source: str, trust_remote_code: bool = False) -> SourceModel:
    """Like `open_checkpoint`, for GGUF files too.

    Raises:
        ModelError: it cannot be found or used, or is damaged.
    """
    path, _ = locate(name, source)
    if path.is_file():
        return SourceModel(find(str(path), source=source), path, {}, [])
    return open_checkpoint(str(path), scratch, source=source, trust_remote_code=trust_remote_code)


def read_tensors(files: list[Path]) -> dict[str, mx.array]:
    """All tensors of some checked weight files under their own names; none is read before somebody asks."""
    tensors: dict[str, mx.array] = {}
    for file in files:
        loaded = mx.load(str(file), format="safetensors")
        assert isinstance(loaded, dict)
        tensors.update(loaded)
    return tensors


def link_files(folder: Path, files: list[Path], scratch: Path) -> None:
    """A folder in which mlx-lm finds these weight files and no others."""
    scratch.mkdir()
    # Resolved, since the Hub's cache is itself made of links, relative to where they are.
    (scratch / "config.json").symlink_to((folder / "config.json").resolve())
    for number, file in enumerate(files):
        (scratch / f"model-{number:05d}.safetensors").symlink_to(file.resolve())


def unpickled(folder: Path, scratch: Path) -> list[Path]:
    """Pickled weights as safetensors in `scratch`."""
    found = sorted({file for pattern in _PICKLED for file in folder.glob(pattern)})
    if not found:
        raise ModelError(f"{folder}: no model*.safetensors in this folder; download the weights as well.")
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        found = [folder / name for name in sorted(set(shard_names(index).values()))]
        missing = [file.name for file in found if not file.is_file()]
        if missing:
            raise ModelError(f"{folder}: {missing[0]} of {len(found)} weight files is missing; download it again.")
    # Pickled files are read a file at a time, written and let go of: no more is in memory at once.
    torch = _torch(found[0])
    scratch.mkdir()
    check_space(scratch, sum(file.stat().st_size for file in found))
    (scratch / "config.json").symlink_to((folder / "config.json").resolve())
    for number, file in enumerate(found):
        weights = _read_pickle(torch, file)
        save_safetensors(scratch / f"model-{number:05d}.safetensors", weights, {"format": "pt"})
    return sorted(scratch.glob("model-*.safetensors"))


def _torch(file: Path) -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise ModelError(
            f"{file}: pickled weights can run code when they are read and are taken only with torch's safe reader; "
            "get the checkpoint's safetensors, or 'pip install torch'."
        ) from None


def _read_pickle(torch: Any, file: Path) -> dict[str, mx.array]:
    """The tensors of a pickled file, by torch's reader that runs no code."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, zip errors.
        raise ModelError(
            f"{file}: torch's safe reader refuses it ({reason_of(error)}); get the checkpoint's safetensors."
        ) from None
    table = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(table, Mapping) or not all(hasattr(value, "numpy") for value in table.values()):
        raise ModelError(f"{file}: holds something else than a table of tensors; get the checkpoint's safetensors.")
    return {str(name): _to_mlx(torch, tensor) for name, tensor in table.items()}


def _to_mlx(torch: Any, tensor: Any) -> mx.array:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none.
        return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(np.asarray(tensor.numpy()))
