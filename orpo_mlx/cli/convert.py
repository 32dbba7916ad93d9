"""Checkpoints of every kind, in and out: Hugging Face, GGUF and PEFT to MLX, and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_mlx.cli.common.arguments import add_trust_remote_code, check_replaced
from orpo_mlx.config.flags import OneLineParser, exit_status, naming_flags, with_flags
from orpo_mlx.convert.quantisation import AFFINE_BITS, AFFINE_GROUPS, MIXED, QUANTISATION_MODES, quantisation
from orpo_mlx.errors import ConfigError
from orpo_mlx.models.names import DTYPES

if TYPE_CHECKING:
    from orpo_mlx.convert.task import Task

PROG = "orpo-mlx convert"


def build_parser() -> OneLineParser:
    """The command line of `convert`."""
    parser = OneLineParser(prog=PROG, description="Checkpoints of every kind, in and out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser)

    def add_command(name: str, description: str) -> OneLineParser:
        return commands.add_parser(name, help=description, description=description)

    hf = add_command("hf", "Hugging Face folder or Hub id to an MLX folder")
    hf.add_argument("source", metavar="SRC", help="Hub id or folder")
    add_destination(hf)
    add_shrinking(hf)
    gguf = add_command("gguf", "GGUF file to an MLX folder")
    gguf.add_argument("source", metavar="SRC.gguf", help="GGUF file")
    add_destination(gguf)
    add_shrinking(gguf)
    gguf.add_argument(
        "--keep-quantized", action="store_true", help="keep blocks of 4 and 8 bits as MLX's quantised layers"
    )
    for name, description in (
        ("peft-to-mlx", "PEFT's LoRA, rsLoRA or DoRA adapter to mlx-lm's form"),
        ("mlx-to-peft", "adapter of mlx-lm or orpo_mlx to PEFT's form"),
    ):
        adapter = add_command(name, description)
        adapter.add_argument("source", metavar="SRC", help="adapter folder")
        add_destination(adapter)
        adapter.add_argument("--model", required=True, help="its base model: Hub id, folder or .gguf file")
    to_gguf = add_command("mlx-to-gguf", "LoRA adapter of mlx-lm or orpo_mlx to a GGUF file for llama.cpp and others")
    to_gguf.add_argument("source", metavar="SRC", help="adapter folder")
    to_gguf.add_argument("destination", metavar="DST.gguf", help="file to write")
    to_gguf.add_argument("--model", required=True, help="its base model: Hub id, folder or .gguf file")
    to_gguf.add_argument("--overwrite", action="store_true", help="replace DST.gguf")
    add_trust_remote_code(to_gguf)
    whole = add_command("to-gguf", "model, with an adapter or without, to a GGUF file for llama.cpp and others")
    whole.add_argument("source", metavar="SRC", help="Hub id, folder or .gguf file")
    whole.add_argument("--adapter-path", help="folder of adapters in mlx-lm's form, to be merged into it")
    add_destination(whole, "DST.gguf", "file to write")
    whole.add_argument("--dtype", choices=tuple(DTYPES), help="of matrices (default: as they are)")
    merge = add_command("merge", "model and adapter to one model in Hugging Face layout")
    merge.add_argument("--model", required=True, help="base model: Hub id, folder or .gguf file")
    merge.add_argument("--adapter-path", required=True, help="folder of adapters in mlx-lm's form")
    merge.add_argument("--data", metavar="FILE", help="pairs to measure on how much of the adapter's effect is kept")
    add_destination(merge)
    add_shrinking(merge, (*QUANTISATION_MODES, MIXED))
    return parser


def add_destination(parser: argparse.ArgumentParser, name: str = "DST", what: str = "folder to write") -> None:
    """Where the result goes, and what must hold of it."""
    parser.add_argument("destination", metavar=name, help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace DST, once the new one is whole")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare log-probs of built-in texts before and after; nothing is kept if they differ (default: do)",
    )
    add_trust_remote_code(parser)


def add_shrinking(parser: argparse.ArgumentParser, modes: Sequence[str] = QUANTISATION_MODES) -> None:
    """Another dtype, or fewer bits."""
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of floating-point weights (default: as they are)")
    parser.add_argument("--quantize", action="store_true", help="quantise every layer that can be")
    parser.add_argument("--bits", type=int, choices=AFFINE_BITS, help="default: 4")
    # 16 is nvfp4's alone; `quantisation` refuses it for the others.
    parser.add_argument("--group-size", type=int, choices=(16, *AFFINE_GROUPS), help="default: 64")
    parser.add_argument("--mode", choices=modes, help="default: affine")


def task_of(args: argparse.Namespace) -> Task:
    """What all conversions have in common; raises ConfigError where flags do not go together."""
    from orpo_mlx.convert.task import Task

    common = Task(Path(args.destination).expanduser(), args.overwrite, args.verify, args.trust_remote_code)
    if "quantize" not in args:
        return common._replace(dtype=vars(args).get("dtype"))
    asked = [flag for flag in ("bits", "group_size", "mode") if getattr(args, flag) is not None]
    if asked and not args.quantize:
        raise ConfigError(f"`{asked[0]}`: does nothing without `quantize`; give both.")
    how = quantisation(args.bits, args.group_size, args.mode or "affine") if args.quantize else None
    return common._replace(dtype=args.dtype, how=how)


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    args = build_parser().parse_args(argv)
    flags = {"SRC": "source", "--model": "model", "--adapter-path": "adapter_path", "--data": "data"}
    read = {name: vars(args).get(key) for name, key in flags.items()}
    check_replaced(Path(args.destination).expanduser(), read)
    # Only now: a mistyped flag need not wait for mlx-lm and transformers.
    from orpo_mlx.convert import conversions

    with naming_flags(vars(args)):
        if args.command == "mlx-to-gguf":
            from orpo_mlx.convert.gguf_adapter import convert_mlx_to_gguf

            destination = Path(args.destination).expanduser()
            trust = args.trust_remote_code
            convert_mlx_to_gguf(args.source, args.model, destination, overwrite=args.overwrite, trust=trust)
            return
        task = task_of(args)
        if args.command == "to-gguf":
            from orpo_mlx.convert.gguf_model import convert_to_gguf

            convert_to_gguf(args.source, args.adapter_path, task)
            return
        if args.command == "merge" and args.data is not None and not Path(args.data).is_file():
            # Said before the work, not after it.
            raise ConfigError(f"`data` {args.data}: no such file; give a file of pairs.")
        if args.command == "hf":
            conversions.convert_hf(args.source, task)
        elif args.command == "gguf":
            conversions.convert_gguf(args.source, args.keep_quantized, task)
        elif args.command == "peft-to-mlx":
            conversions.convert_peft_to_mlx(args.source, args.model, task)
        elif args.command == "mlx-to-peft":
            conversions.convert_mlx_to_peft(args.source, args.model, task)
        else:
            conversions.convert_merge(args.model, args.adapter_path, task)
            if args.data is not None:
                say_effect(args, task.destination)


def say_effect(args: argparse.Namespace, merged: Path) -> None:
    """Measure what a merged model keeps of its adapter's effect, and print it."""
    from orpo_mlx.convert.effect import effect_text, measure_effect

    adapter = Path(args.adapter_path).expanduser()
    effect = measure_effect(args.model, adapter, merged, Path(args.data), trust_remote_code=args.trust_remote_code)
    print(with_flags(effect_text(effect), ("mode", "bits")))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
