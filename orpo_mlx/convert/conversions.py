"""Checkpoints of every kind, in and out: Hugging Face, GGUF and PEFT to MLX, and back."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from orpo_mlx.convert.merge import full_weights, fuse, is_quantised, merged_tensors, model_tensors
from orpo_mlx.convert.open_checkpoint import SourceModel, open_checkpoint, open_model, read_tensors
from orpo_mlx.convert.peft_adapters import mlx_to_peft, write_adapter
from orpo_mlx.convert.quantisation import MIXED, Quantisation
from orpo_mlx.convert.task import SCRATCH, Task, report, with_dtype, write_model
from orpo_mlx.convert.verify import (
    MERGED,
    ROUNDED,
    allowed_difference,
    record_baseline,
    verify_adapter,
    verify_model,
    verify_round_trip,
)
from orpo_mlx.convert.write_model import copy_companions, write_json, write_weights
from orpo_mlx.errors import ConfigError, ModelError
from orpo_mlx.files import staged_folder
from orpo_mlx.models.adapters import add_trained_adapters
from orpo_mlx.models.gguf.architectures import read_config
from orpo_mlx.models.gguf.file import read_gguf
from orpo_mlx.models.gguf.loading import load_gguf, read_weights
from orpo_mlx.models.loading import find, load_lazily, locate
from orpo_mlx.models.names import DTYPES
from orpo_mlx.models.peft_adapters import Adapter, peft_to_mlx, read_adapter
from orpo_mlx.run_folder import ADAPTERS_FILE, PEFT_WEIGHTS


def convert_hf(source: str, task: Task) -> None:
    """A Hub id or folder in Hugging Face layout to an MLX folder.

    Raises:
        UserError: something is wrong with the source, the destination or the result; nothing is left behind.
    """
    with new_folder(task) as folder:
        checkpoint = open_checkpoint(source, folder / SCRATCH, source="SRC", trust_remote_code=task.trust_remote_code)
        baseline = record_baseline(task, checkpoint.info)
        model, loaded = load_lazily(checkpoint.info, trust_remote_code=task.trust_remote_code)
        # Other libraries' quantised layers are mlx-lm's once it has loaded them.
        config = {**checkpoint.config, **{key: loaded[key] for key in loaded if key.startswith("quantization")}}
        written = write_model(task, folder, model, config)
        copy_companions(checkpoint.folder, folder, code=task.trust_remote_code)
        verify_model(task, folder, baseline, allowed_difference(task), checkpoint.folder)
    report(task, written)


def convert_gguf(source: str, keep_quantised: bool, task: Task) -> None:
    """A GGUF file to an MLX folder; `keep_quantised` leaves its blocks of 4 and 8 bits as they are.

    Raises:
        UserError: see `convert_hf`.
    """
    if keep_quantised and (task.dtype is not None or task.how is not None):
        raise ConfigError(
            "`keep_quantized`: keeps the file's own blocks, so `dtype` and `quantize` cannot be given too."
        )
    path, _ = locate(source, "SRC")
    if not path.is_file():
        raise ModelError(f"SRC {source}: is a folder, expected a .gguf file; use the hf command for it.")
    with new_folder(task) as folder:
        info = find(str(path), source="SRC")
        baseline = record_baseline(task, info)
        if keep_quantised:
            written = write_quantised_blocks(task, path, folder)
        else:
            model, config = load_gguf(path, DTYPES[task.dtype or "float16"])
            written = write_model(task, folder, model, config)
        if info.tokenizer is not None:
            info.tokenizer.save_pretrained(folder)
        # Kept blocks have scales in float16, and a dtype that was asked for rounds: both are no exact copies.
        rounded = keep_quantised or (task.dtype is not None and task.how is None)
        limit = ROUNDED if rounded else allowed_difference(task)
        plain = task.how is None and not keep_quantised
        verify_model(task, folder, baseline, limit, folder if plain else None)
    report(task, written)


def write_quantised_blocks(task: Task, path: Path, folder: Path) -> int:
    """Weights and config of a GGUF file whose blocks stay quantised; the bytes of the weights.

    Raises:
        ConfigError: it has none that can.
    """
    file = read_gguf(path)
    config = read_config(file)
    weights = read_weights(file, config, keep_quantised=True)
    if "quantization" not in config:
        raise ConfigError(f"`keep_quantized`: {path} has no blocks of 4 or 8 bits that MLX's layers can hold.")
    written = write_weights(folder, weights, task.destination, layout="mlx")
    write_json(folder / "config.json", config)
    return written


def convert_peft_to_mlx(source: str, model: str, task: Task) -> None:
    """A PEFT adapter folder to mlx-lm's form.

    Raises:
        UserError: see `convert_hf`.
    """
    convert_adapter(source, model, task, to_mlx=True)


def convert_mlx_to_peft(source: str, model: str, task: Task) -> None:
    """An adapter folder of mlx-lm or of `train` to PEFT's form.

    Raises:
        UserError: see `convert_hf`.
    """
    convert_adapter(source, model, task, to_mlx=False)


def convert_adapter(source: str, model_name: str, task: Task, *, to_mlx: bool) -> None:
    """An adapter of one form to the other, and back again to see that nothing is lost.

    Raises:
        UserError: see `convert_hf`.
    """
    with new_folder(task) as folder:
        path = _adapter_folder(source, "SRC")
        own_file, new_file = (PEFT_WEIGHTS, ADAPTERS_FILE) if to_mlx else (ADAPTERS_FILE, PEFT_WEIGHTS)
        adapter = read_adapter(path, own_file, source="SRC")
        base = open_model(model_name, folder / SCRATCH, source="`model`", trust_remote_code=task.trust_remote_code)

        def as_mlx(peft: Adapter) -> Adapter:
            return peft_to_mlx(peft, base_model(task, base), base.info.config, str(path))

        def as_peft(mlx: Adapter) -> Adapter:
            names = base.tensor_names()
            return mlx_to_peft(mlx, base_model(task, base), base.info.config, names, model_name, str(path))

        there, back = (as_mlx, as_peft) if to_mlx else (as_peft, as_mlx)
        converted = there(adapter)
        written = write_adapter(folder, new_file, converted)
        if task.verify:
            verify_round_trip(task, adapter, back(converted))
            mlx_folder, peft_folder = (folder, path) if to_mlx else (path, folder)
            verify_adapter(task, base, mlx_folder, peft_folder)
    report(task, written)


def convert_merge(model_name: str, adapter_path: str, task: Task) -> None:
    """A model and an adapter to one model: in Hugging Face layout, or quantised in mlx-lm's.

    Raises:
        UserError: see `convert_hf`.
    """
    with new_folder(task) as folder:
        adapter = _adapter_folder(adapter_path, "`adapter_path`")
        trust = task.trust_remote_code
        read_adapter(adapter, ADAPTERS_FILE, source="`adapter_path`")
        base = open_model(model_name, folder / SCRATCH, source="`model`", trust_remote_code=trust)
        baseline = record_baseline(task, base.info, adapter)
        model, loaded = load_lazily(base.info, trust_remote_code=trust)
        config = base.config or loaded
        # Merging dequantises: what the base model's config says of its form no longer holds.
        config = {key: config[key] for key in config if not key.startswith("quantization")}
        quantised = is_quantised(model)
        # Before the adapters are loaded: they take these weights' place.
        replaced = full_weights(model, adapter)
        add_trained_adapters(model, adapter)
        replaced |= fuse(model, DTYPES[task.dtype] if task.dtype else None, str(adapter))
        exact = all(array.dtype == mx.float32 for array in dict(tree_flatten(model.parameters())).values())
        if task.how is not None:
            written = write_model(task._replace(how=mixed(task.how, replaced)), folder, model, config)
        elif quantised or not base.files:
            written = write_tensors(task, folder, model_tensors(model, str(adapter)), config)
        else:
            tensors = merged_tensors(read_tensors(base.files), model, replaced, str(adapter))
            written = write_tensors(task, folder, tensors, config)
        write_companions(task, base, folder)
        limit = allowed_difference(task, unchanged=MERGED if exact else ROUNDED)
        verify_model(task, folder, baseline, limit, folder if task.how is None else None)
    report(task, written)


def mixed(how: Quantisation, replaced: Collection[str]) -> Quantisation:
    """A mixed form as affine, with the layers finer whose weights, `replaced`, an adapter has changed."""
    if how.mode != MIXED:
        return how
    return how._replace(mode="affine", finer=tuple(name.removesuffix(".weight") for name in replaced))


@contextmanager
def new_folder(task: Task) -> Iterator[Path]:
    """The destination while it is made, there whole or not at all; what was only needed meanwhile is removed."""
    with staged_folder(task.destination, overwrite=task.overwrite) as folder:
        yield folder
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)


def write_tensors(task: Task, folder: Path, tensors: dict[str, mx.array], config: dict[str, Any]) -> int:
    """Weights in Hugging Face's layout, in the dtype that was asked for, and config; the bytes of the weights."""
    if task.dtype is not None:
        dtype = DTYPES[task.dtype]
        for name, array in tensors.items():
            if mx.issubdtype(array.dtype, mx.floating):
                tensors[name] = array.astype(dtype)
        config = with_dtype(config, task.dtype)
    written = write_weights(folder, tensors, task.destination, layout="pt")
    write_json(folder / "config.json", config)
    return written


def write_companions(task: Task, base: SourceModel, folder: Path) -> None:
    """Tokenizer and what else came with the base model."""
    if base.folder.is_dir():
        copy_companions(base.folder, folder, code=task.trust_remote_code)
    elif base.info.tokenizer is not None:
        base.info.tokenizer.save_pretrained(folder)


def _adapter_folder(name: str, source: str) -> Path:
    """A folder that the user gave as `source`."""
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ModelError(f"{source} {name}: no such folder; an adapter on the Hub must be downloaded first.")
    return path


def base_model(task: Task, base: SourceModel) -> nn.Module:
    """A model to put adapters on: a new one each time, its weights not read before somebody asks."""
    return load_lazily(base.info, trust_remote_code=task.trust_remote_code)[0]
