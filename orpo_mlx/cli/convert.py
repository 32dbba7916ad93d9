"""Checkpoints of every kind, in and out: Hugging Face, GGUF and PEFT to MLX, and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orpo_mlx.config.flags import OneLineParser, exit_status, naming_flags
from orpo_mlx.convert.conversions import (
    convert_gguf,
    convert_hf,
    convert_merge,
    convert_mlx_to_peft,
    convert_peft_to_mlx,
)
from orpo_mlx.convert.quantize import AFFINE_BITS, AFFINE_GROUPS, QUANTISATION_MODES, quantisation
from orpo_mlx.convert.task import Task
from orpo_mlx.errors import ConfigError
from orpo_mlx.models.names import DTYPES

PROG = "orpo-mlx convert"


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
    parser.add_argument("--mode", choices=QUANTISATION_MODES, help="default: affine")


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
        with naming_flags(vars(args)):
            args.run(args)

    return exit_status(PROG, command)


if __name__ == "__main__":
    sys.exit(main())
