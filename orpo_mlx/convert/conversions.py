"""Checkpoints of every kind, in and out: Hugging Face, GGUF and PEFT to MLX, and back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from orpo_mlx.convert.merge import full_weights, fuse, is_quantised, merged_tensors, model_tensors
from orpo_mlx.convert.open_checkpoint import Base, open_checkpoint, open_model, read_tensors
from orpo_mlx.convert.peft_adapters import (
    MLX_WEIGHTS,
    PEFT_WEIGHTS,
    mlx_to_peft,
    peft_to_mlx,
    read_adapter,
    write_adapter,
)
from orpo_mlx.convert.task import SCRATCH, Task, report, with_dtype, write_model
from orpo_mlx.convert.verify import MERGED, ROUNDED, check_of, limit_of, verify_adapter, verify_model, verify_round_trip
from orpo_mlx.convert.write_model import copy_companions, write_json, write_weights
from orpo_mlx.errors import ConfigError, ModelError
from orpo_mlx.files import staged_folder
from orpo_mlx.models.adapters import add_trained_adapters
from orpo_mlx.models.gguf.architectures import read_config
from orpo_mlx.models.gguf.file import read_gguf
from orpo_mlx.models.gguf.loading import load_gguf, read_weights
from orpo_mlx.models.loading import find, load_lazily, locate
from orpo_mlx.models.names import DTYPES


def convert_hf(source: str, task: Task) -> None:
    """A Hub id or folder in Hugging Face layout to an MLX folder.

    Raises:
        UserError: something is wrong with the source, the destination or the result; nothing is left behind.
    """
    with staged_folder(task.destination, overwrite=task.overwrite) as folder:
        checkpoint = open_checkpoint(source, folder / SCRATCH, source="SRC", trust_remote_code=task.trust_remote_code)
        check = check_of(task, checkpoint.info)
        model, loaded = load_lazily(checkpoint.info, trust_remote_code=task.trust_remote_code)
        # Other libraries' quantised layers are mlx-lm's once it has loaded them.
        config = {**checkpoint.config, **{key: loaded[key] for key in loaded if key.startswith("quantization")}}
        written = write_model(task, folder, model, config)
        copy_companions(checkpoint.folder, folder, code=task.trust_remote_code)
        verify_model(task, folder, check, limit_of(task), checkpoint.folder)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    report(task, written)


def convert_gguf(source: str, keep_quantised: bool, task: Task) -> None:
    """A GGUF file to an MLX folder.

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
    with staged_folder(task.destination, overwrite=task.overwrite) as folder:
        info = find(str(path), source="SRC")
        check = check_of(task, info)
        if keep_quantised:
            file = read_gguf(path)
            config = read_config(file)
            weights = read_weights(file, config, keep_quantised=True)
            if "quantization" not in config:
                raise ConfigError(f"`keep_quantized`: {path} has no blocks of 4 or 8 bits that MLX's layers can hold.")
            written = write_weights(folder, weights, task.destination, layout="mlx")
            write_json(folder / "config.json", config)
        else:
            model, config = load_gguf(path, DTYPES[task.dtype or "float16"])
            written = write_model(task, folder, model, config)
        if info.tokenizer is not None:
            info.tokenizer.save_pretrained(folder)
        as_it_was = task.dtype is None and not keep_quantised
        limit = limit_of(task) if as_it_was else ROUNDED if task.how is None else limit_of(task)
        verify_model(task, folder, check, limit, folder if task.how is None and not keep_quantised else None)
    report(task, written)


def convert_peft_to_mlx(source: str, model: str, task: Task) -> None:
    """A PEFT adapter folder to mlx-lm's form.

    Raises:
        UserError: see `convert_hf`.
    """
    with staged_folder(task.destination, overwrite=task.overwrite) as folder:
        path = _folder(source, "SRC")
        peft = read_adapter(path, PEFT_WEIGHTS, source="SRC")
        base = open_model(model, folder / SCRATCH, source="`model`", trust_remote_code=task.trust_remote_code)
        adapter = peft_to_mlx(peft, _lazy(task, base), str(path))
        written = write_adapter(folder, MLX_WEIGHTS, adapter)
        if task.verify:
            back = mlx_to_peft(adapter, _lazy(task, base), base.names(), model, str(path))
            verify_round_trip(task, peft, back)
            verify_adapter(task, base, folder, path)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    report(task, written)


def convert_mlx_to_peft(source: str, model: str, task: Task) -> None:
    """An adapter folder of mlx-lm or of `train` to PEFT's form.

    Raises:
        UserError: see `convert_hf`.
    """
    with staged_folder(task.destination, overwrite=task.overwrite) as folder:
        path = _folder(source, "SRC")
        adapter = read_adapter(path, MLX_WEIGHTS, source="SRC")
        base = open_model(model, folder / SCRATCH, source="`model`", trust_remote_code=task.trust_remote_code)
        peft = mlx_to_peft(adapter, _lazy(task, base), base.names(), model, str(path))
        written = write_adapter(folder, PEFT_WEIGHTS, peft)
        if task.verify:
            verify_round_trip(task, adapter, peft_to_mlx(peft, _lazy(task, base), str(path)))
            verify_adapter(task, base, path, folder)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    report(task, written)


def convert_merge(model_name: str, adapter_path: str, task: Task) -> None:
    """A model and an adapter to one model: in Hugging Face layout, or quantised in mlx-lm's.

    Raises:
        UserError: see `convert_hf`.
    """
    with staged_folder(task.destination, overwrite=task.overwrite) as folder:
        adapter, trust = _folder(adapter_path, "`adapter_path`"), task.trust_remote_code
        read_adapter(adapter, MLX_WEIGHTS, source="`adapter_path`")
        base = open_model(model_name, folder / SCRATCH, source="`model`", trust_remote_code=trust)
        check = check_of(task, base.info, adapter)
        model, loaded = load_lazily(base.info, trust_remote_code=trust)
        config = base.config or loaded
        config = {key: config[key] for key in config if not key.startswith("quantization")}
        quantised, replaced = is_quantised(model), full_weights(model, adapter)
        add_trained_adapters(model, adapter)
        replaced |= fuse(model, DTYPES[task.dtype] if task.dtype else None, str(adapter))
        exact = all(array.dtype == mx.float32 for array in dict(tree_flatten(model.parameters())).values())
        if task.how is not None:
            written = write_model(task, folder, model, config)
        elif quantised or not base.files:
            written = _write_tensors(task, folder, model_tensors(model, str(adapter)), config)
        else:
            tensors = merged_tensors(read_tensors(base.files), model, replaced, str(adapter))
            written = _write_tensors(task, folder, tensors, config)
        _write_companions(task, base, folder)
        limit = limit_of(task, unchanged=MERGED if exact else ROUNDED)
        verify_model(task, folder, check, limit, folder if task.how is None else None)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    report(task, written)


def _write_tensors(task: Task, folder: Path, tensors: dict[str, mx.array], config: dict[str, Any]) -> int:
    if task.dtype is not None:
        dtype = DTYPES[task.dtype]
        for name, array in tensors.items():
            if mx.issubdtype(array.dtype, mx.floating):
                tensors[name] = array.astype(dtype)
        config = with_dtype(config, task.dtype)
    written = write_weights(folder, tensors, task.destination, layout="pt")
    write_json(folder / "config.json", config)
    return written


def _write_companions(task: Task, base: Base, folder: Path) -> None:
    if base.folder.is_dir():
        copy_companions(base.folder, folder, code=task.trust_remote_code)
    elif base.info.tokenizer is not None:
        base.info.tokenizer.save_pretrained(folder)


def _folder(name: str, source: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ModelError(f"{source} {name}: no such folder; an adapter on the Hub must be downloaded first.")
    return path


def _lazy(task: Task, base: Base) -> nn.Module:
    return load_lazily(base.info, trust_remote_code=task.trust_remote_code)[0]
