"""Whether a training run fits a Mac, before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from orpo_mlx.cli.common.arguments import check_from_beginning
from orpo_mlx.cli.common.heartbeat import heartbeat
from orpo_mlx.config.checks import parse_number
from orpo_mlx.config.command_line import resolve
from orpo_mlx.config.flags import OneLineParser, exit_status, flag_of
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.config.traits import POSITIVE
from orpo_mlx.engine.modes import MODES
from orpo_mlx.errors import ConfigError

PROG = "orpo-mlx fit"
_RUNNING = "running steps of small models of this shape"


class FitRequest(NamedTuple):
    """What is asked."""

    config: TrainingConfig
    memory_gib: float | None
    """Of the Mac; None asks which Macs hold the run."""
    prompt_tokens: int | None
    """Of the tokens of a pair's side; None: half of them."""


def build_parser() -> OneLineParser:
    """The flags `fit` has beside those of `train`."""
    parser = OneLineParser(
        prog=PROG,
        description="Predicted peak of MLX's memory in a training step, what it is made of, and whether it fits.",
        epilog="Flags of orpo-mlx train are taken as well, but for --test, --resume and --dry-run.",
        allow_abbrev=False,
    )
    parser.add_argument("--memory", metavar="GIB", help="memory of the Mac (default: say which Macs it fits)")
    parser.add_argument(
        "--mode", metavar="MODE", choices=tuple(MODES), help=f"train's --memory: {', '.join(MODES)} (default: fast)"
    )
    parser.add_argument("--prompt-tokens", metavar="N", help="of the tokens of a pair's side (default: half of them)")
    return parser


def fit_request(argv: Sequence[str] | None) -> FitRequest:
    """What a command line asks.

    Raises:
        ConfigError: flags that cannot be used.
    """
    own, arguments = build_parser().parse_known_args(argv)
    config = resolve([*arguments, *(("--memory", own.mode) if own.mode else ())], PROG, check_from_beginning)
    memory = None if own.memory is None else parse_number(own.memory, float, POSITIVE, "--memory")
    prompt = own.prompt_tokens
    prompt = None if prompt is None else int(parse_number(prompt, int, POSITIVE, "--prompt-tokens"))
    if config.max_seq_length < 2 or (prompt is not None and prompt >= config.max_seq_length):
        raise ConfigError(
            f"--max-seq-length {config.max_seq_length}: leaves no token for the completion; give a larger one."
        )
    return FitRequest(config, memory, prompt)


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    config, memory, prompt = fit_request(argv)
    with heartbeat("loading libraries and the model's shape"):
        # Only now: a mistyped flag need not wait for mlx-lm and transformers.
        from orpo_mlx.memory.fit import describe, predicted, remedies, verdict
        from orpo_mlx.memory.predict import recommended_working_set
        from orpo_mlx.memory.skeleton import read_blueprint

        blueprint = read_blueprint(config.model, dtype=config.dtype)
    print("A step is run on models of this shape with few layers; with a large model it takes a while.", flush=True)
    with heartbeat(_RUNNING):
        prediction = predicted(config, blueprint, prompt)
    print(f"{config.method}, {config.batch_size} pairs of {config.max_seq_length} tokens a side, predicted:")
    print(describe(prediction))
    print(verdict(prediction.peak, memory))
    if memory is None or prediction.peak <= recommended_working_set(memory):
        return
    print("That is the lowest figure reported for such Macs: newer systems recommend more, and train asks the device.")
    for changed, smaller in remedies(config):
        share = None if prompt is None else max(1, prompt * smaller.max_seq_length // config.max_seq_length)
        with heartbeat(_RUNNING):
            peak = predicted(smaller, blueprint, share).peak
        fits = peak <= recommended_working_set(memory)
        flags = " ".join(flag_of(name, str(value)) for name, value in changed.items())
        print(f"  with {flags}: {peak:.2f} GiB{', which fits' if fits else ''}")
        if fits:
            return
    print("No flag makes it fit: take a smaller model, or one quantised to 4 bits.")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
