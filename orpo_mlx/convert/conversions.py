"""Checkpoints of every kind, in and out: Hugging Face, GGUF and PEFT to MLX, and back."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from orpo_mlx.config.cli import OneLineParser, exit_status
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
from orpo_mlx.convert.quantize import AFFINE_BITS, AFFINE_GROUPS, MODES, quantisation
from orpo_mlx.convert.task import (
    SCRATCH,
    Task,
    check_of,
    limit_of,
    report,
    verify_adapter,
    verify_model,
    verify_round_trip,
    with_dtype,
    write_model,
)
from orpo_mlx.convert.verify import MERGED, ROUNDED
from orpo_mlx.convert.write_model import copy_companions, write_json, write_weights
from orpo_mlx.engine.score import add_trained_adapters
from orpo_mlx.errors import ConfigError, ModelError
from orpo_mlx.files import staged_folder
from orpo_mlx.models.gguf.architectures import read_config
from orpo_mlx.models.gguf.file import read_gguf
from orpo_mlx.models.gguf.loading import load_gguf, read_weights
from orpo_mlx.models.loading import DTYPES, find, load_lazily, locate

PROG = "orpo-mlx convert"


def convert_hf(source: str, task: Task) -> None:
    """A Hub id or folder in Hugging Face layout to an MLX folder.

    Raises:
        UserError: something is wrong with the source, the destination or the result; nothing is left behind.
    """
    with staged_folder(task.destination, overwrite=task.overwrite) as folder:
        checkpoint = open_checkpoint(source, folder / SCRATCH, flag="SRC", trust_remote_code=task.trust_remote_code)
        check = check_of(task, checkpoint.head)
        model, loaded = load_lazily(checkpoint.head, trust_remote_code=task.trust_remote_code)
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
            "--keep-quantized: keeps the file's own blocks, so --dtype and --quantize cannot be given too."
        )
    path, _ = locate(source, "SRC")
    if not path.is_file():
        raise ModelError(f"SRC {source}: is a folder, expected a .gguf file; use the hf command for it.")
    with staged_folder(task.destination, overwrite=task.overwrite) as folder:
        head = find(str(path), flag="SRC")
        check = check_of(task, head)
        if keep_quantised:
            file = read_gguf(path)
            config = read_config(file)
            weights = read_weights(file, config, keep_quantised=True)
            if "quantization" not in config:
                raise ConfigError(f"--keep-quantized: {path} has no blocks of 4 or 8 bits that MLX's layers can hold.")
            written = write_weights(folder, weights, task.destination, layout="mlx")
            write_json(folder / "config.json", config)
        else:
            model, _, config = load_gguf(path, DTYPES[task.dtype or "float16"])
            written = write_model(task, folder, model, config)
        if head.tokenizer is not None:
            head.tokenizer.save_pretrained(folder)
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
        peft = read_adapter(path, PEFT_WEIGHTS, flag="SRC")
        base = open_model(model, folder / SCRATCH, flag="--model", trust_remote_code=task.trust_remote_code)
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
        adapter = read_adapter(path, MLX_WEIGHTS, flag="SRC")
        base = open_model(model, folder / SCRATCH, flag="--model", trust_remote_code=task.trust_remote_code)
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
        adapter, trust = _folder(adapter_path, "--adapter-path"), task.trust_remote_code
        read_adapter(adapter, MLX_WEIGHTS, flag="--adapter-path")
        base = open_model(model_name, folder / SCRATCH, flag="--model", trust_remote_code=trust)
        check = check_of(task, base.head, adapter)
        model, loaded = load_lazily(base.head, trust_remote_code=trust)
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
    elif base.head.tokenizer is not None:
        base.head.tokenizer.save_pretrained(folder)


def _folder(name: str, flag: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ModelError(f"{flag} {name}: no such folder; an adapter on the Hub must be downloaded first.")
    return path


def _lazy(task: Task, base: Base) -> nn.Module:
    return load_lazily(base.head, trust_remote_code=task.trust_remote_code)[0]


def build_parser() -> OneLineParser:
    """The command line of `convert`."""
    parser = OneLineParser(prog=PROG, description="Checkpoints of every kind, in and out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser)
    hf = _command(commands, "hf", "Hugging Face folder or Hub id to an MLX folder", _run_hf)
    hf.add_argument("source", metavar="SRC", help="Hub id or folder")
    _add_destination(hf)
    _add_shrinking(hf)
    gguf = _command(commands, "gguf", "GGUF file to an MLX folder", _run_gguf)
    gguf.add_argument("source", metavar="SRC.gguf", help="GGUF file")
    _add_destination(gguf)
    _add_shrinking(gguf)
    gguf.add_argument(
        "--keep-quantized", action="store_true", help="keep blocks of 4 and 8 bits as MLX's quantised layers"
    )
    for name, convert, description in (
        ("peft-to-mlx", convert_peft_to_mlx, "PEFT's LoRA, rsLoRA or DoRA adapter to mlx-lm's form"),
        ("mlx-to-peft", convert_mlx_to_peft, "adapter of mlx-lm or orpo_mlx to PEFT's form"),
    ):
        adapter = _command(commands, name, description, _run_adapter)
        adapter.set_defaults(convert=convert)
        adapter.add_argument("source", metavar="SRC", help="adapter folder")
        _add_destination(adapter)
        adapter.add_argument("--model", required=True, help="its base model: Hub id, folder or .gguf file")
    merge = _command(commands, "merge", "model and adapter to one model in Hugging Face layout", _run_merge)
    merge.add_argument("--model", required=True, help="base model: Hub id, folder or .gguf file")
    merge.add_argument("--adapter-path", required=True, help="folder of adapters in mlx-lm's form")
    _add_destination(merge)
    _add_shrinking(merge)
    return parser


def _command(
    commands: Any, name: str, description: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run=run)
    return parser


def _add_destination(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", metavar="DST", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace DST, once the new one is whole")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare log-probs of built-in texts before and after; nothing is kept if they differ (default: do)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the checkpoint"
    )


def _add_shrinking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of floating-point weights (default: as they are)")
    parser.add_argument("--quantize", action="store_true", help="quantise every layer that can be")
    parser.add_argument("--bits", type=int, choices=AFFINE_BITS, help="default: 4")
    parser.add_argument("--group-size", type=int, choices=(16, *AFFINE_GROUPS), help="default: 64")
    parser.add_argument("--mode", choices=MODES, help="default: affine")


def _task(args: argparse.Namespace) -> Task:
    destination = Path(args.destination).expanduser()
    common = Task(destination, args.overwrite, args.verify, args.trust_remote_code)
    if "quantize" not in args:
        return common
    asked = [flag for flag in ("bits", "group_size", "mode") if getattr(args, flag) is not None]
    if asked and not args.quantize:
        raise ConfigError(f"--{asked[0].replace('_', '-')}: does nothing without --quantize; give both.")
    how = quantisation(args.bits, args.group_size, args.mode or "affine") if args.quantize else None
    return common._replace(dtype=args.dtype, how=how)


def _run_hf(args: argparse.Namespace) -> None:
    convert_hf(args.source, _task(args))


def _run_gguf(args: argparse.Namespace) -> None:
    convert_gguf(args.source, args.keep_quantized, _task(args))


def _run_adapter(args: argparse.Namespace) -> None:
    args.convert(args.source, args.model, _task(args))


def _run_merge(args: argparse.Namespace) -> None:
    convert_merge(args.model, args.adapter_path, _task(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""

    def command() -> None:
        args = build_parser().parse_args(argv)
        args.run(args)

    return exit_status(PROG, command)


if __name__ == "__main__":
    sys.exit(main())
