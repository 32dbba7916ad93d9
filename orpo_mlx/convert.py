"""Checkpoints of every kind, in and out: Hugging Face, GGUF and PEFT to MLX, and back."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn

from orpo_mlx.cli import OneLineParser, exit_status
from orpo_mlx.errors import ConfigError, ModelError
from orpo_mlx.hf_import import open_checkpoint
from orpo_mlx.model_files import copy_companions, take_weights, write_json, write_weights
from orpo_mlx.models import DTYPES, ModelHead, load, load_lazily
from orpo_mlx.shrinking import AFFINE_BITS, AFFINE_GROUPS, MODES, Quantisation, cast, quantisation, quantise
from orpo_mlx.staging import staged_folder
from orpo_mlx.types import TokenizedPair
from orpo_mlx.verification import (
    EXACT,
    REPORTED,
    ROUNDED,
    Limit,
    Logps,
    compare,
    demand,
    folder_logps,
    has_torch,
    model_logps,
    probe_pairs,
    transformers_logps,
)

PROG = "scripts/convert.py"
_SCRATCH = ".source"


class Check(NamedTuple):
    """What a written model is compared with."""

    pairs: list[TokenizedPair]
    before: Logps


def convert_hf(args: argparse.Namespace) -> None:
    """A Hub id or folder in Hugging Face layout to an MLX folder.

    Raises:
        UserError: something is wrong with the source, the destination or the result; nothing is left behind.
    """
    how = _quantisation(args)
    with staged_folder(args.destination, overwrite=args.overwrite) as folder:
        scratch = folder / _SCRATCH
        source = open_checkpoint(args.source, scratch, flag="SRC", trust_remote_code=args.trust_remote_code)
        check = _check_of(args, source.head)
        model, loaded = load_lazily(source.head, trust_remote_code=args.trust_remote_code)
        config = {**source.config, **{key: loaded[key] for key in loaded if key.startswith("quantization")}}
        written = _write_model(args, folder, model, config, how)
        copy_companions(source.folder, folder, code=args.trust_remote_code)
        _verify_model(args, folder, check, _limit(args.dtype, how), source.folder)
        shutil.rmtree(scratch, ignore_errors=True)
    _report(args, written)


def _quantisation(args: argparse.Namespace) -> Quantisation | None:
    asked = [flag for flag in ("bits", "group_size", "mode") if getattr(args, flag) is not None]
    if not args.quantize:
        if asked:
            raise ConfigError(f"--{asked[0].replace('_', '-')}: does nothing without --quantize; give both.")
        return None
    return quantisation(args.bits, args.group_size, args.mode or "affine")


def _check_of(args: argparse.Namespace, head: ModelHead) -> Check | None:
    """Log-probs of the model before it is converted; None where nothing is to be verified."""
    if not args.verify:
        return None
    pairs = probe_pairs(head.tokenizer, head.config)
    return Check(pairs, model_logps(load(head, trust_remote_code=args.trust_remote_code).model, pairs))


def _limit(dtype: str | None, how: Quantisation | None) -> Limit:
    if how is not None:
        return ROUNDED if how.bits == 8 else REPORTED
    return EXACT if dtype in (None, "float32") else ROUNDED


def _write_model(
    args: argparse.Namespace, folder: Path, model: nn.Module, config: dict[str, Any], how: Quantisation | None
) -> int:
    """Cast and quantise as asked, then weights and config; the bytes of the weights."""
    if args.dtype is not None:
        cast(model, DTYPES[args.dtype])
        config = {**config, **{key: args.dtype for key in ("dtype", "torch_dtype") if key in config or key == "dtype"}}
    if how is not None:
        config, left = quantise(model, config, how)
        if left:
            names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            print(f"{len(left)} layers stay as they are, since {how.group_size} does not divide their width: {names}")
    written = write_weights(folder, take_weights(model), args.destination, layout="mlx")
    write_json(folder / "config.json", config)
    return written


def _verify_model(
    args: argparse.Namespace, folder: Path, check: Check | None, limit: Limit, original: Path | None
) -> None:
    """Compare what was written with what was read, and with transformers' reading of `original` where torch is there."""
    if check is None:
        return
    after = folder_logps(folder, check.pairs, trust_remote_code=args.trust_remote_code)
    _compare(args, "the model as it was", check.before, after, limit)
    if original is None or not has_torch():
        return
    try:
        theirs = transformers_logps(original, check.pairs, trust_remote_code=args.trust_remote_code)
    except ModelError as error:
        print(f"not compared with transformers: {error}")
        return
    _compare(args, "transformers on PyTorch", theirs, after, limit)


def _compare(args: argparse.Namespace, what: str, one: Logps, other: Logps, limit: Limit) -> None:
    difference = compare(one, other)
    print(f"verified against {what}: {difference}")
    demand(difference, limit, str(args.destination))


def _report(args: argparse.Namespace, written: int) -> None:
    print(f"wrote {args.destination}: {written / 1e9:.3f} GB of weights")


def build_parser() -> OneLineParser:
    """The command line of `convert`."""
    parser = OneLineParser(prog=PROG, description="Checkpoints of every kind, in and out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser)
    hf = _command(commands, "hf", convert_hf, "Hugging Face folder or Hub id to an MLX folder")
    hf.add_argument("source", metavar="SRC", help="Hub id or folder")
    _add_destination(hf)
    _add_shrinking(hf)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], description: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run=run)
    return parser


def _add_destination(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""

    def command() -> None:
        args = build_parser().parse_args(argv)
        args.destination = Path(str(args.destination)).expanduser()
        args.run(args)

    return exit_status(PROG, command)


if __name__ == "__main__":
    sys.exit(main())
