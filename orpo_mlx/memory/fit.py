"""Whether a training run fits a Mac, before anything is loaded."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from orpo_mlx.config.cli import OneLineParser, exit_status
from orpo_mlx.config.command_line import resolve
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.engine.memory_modes import MODES
from orpo_mlx.errors import ConfigError
from orpo_mlx.memory.predict import Prediction, made_window, predict, recommended_working_set
from orpo_mlx.memory.skeleton import Blueprint, read_blueprint

PROG = "orpo-mlx fit"
_ORDER = ("plain", "auto", "fast", "balanced", "thrift")
_MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)


def predicted(config: TrainingConfig, blueprint: Blueprint, prompt_tokens: int | None = None) -> Prediction:
    """The peak of a run whose pairs are all `max_seq_length` long; half of that is the prompt where it is not given."""
    prompt = max(1, config.max_seq_length // 2) if prompt_tokens is None else prompt_tokens
    vocabulary = int(blueprint.config.get("vocab_size", 0)) or 256
    return predict(config, blueprint, made_window(config, prompt, vocabulary))


def describe(prediction: Prediction) -> str:
    """The parts of a prediction, a line each."""
    lines = [f"  {name:<12} {part:8.2f} GiB" for name, part in prediction._asdict().items()]
    return "\n".join([*lines, f"  {'peak':<12} {prediction.peak:8.2f} GiB"])


def verdict(peak: float, memory: float | None) -> str:
    """Whether a peak (GiB) fits a Mac with that much memory (GiB), or which Macs it fits."""
    if memory is None:
        fitting = [size for size in _MACS if peak <= recommended_working_set(size)]
        return f"It fits Macs with {fitting[0]} GiB and more." if fitting else "It fits no Mac."
    limit = recommended_working_set(memory)
    fits = "it fits" if peak <= limit else "it does not fit"
    return f"A Mac with {memory:g} GiB recommends a working set of {limit:.2f} GiB: {fits}."


def remedies(config: TrainingConfig) -> Iterator[tuple[str, TrainingConfig]]:
    """Flags that lower the peak, each beside the ones before, what costs least first."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--micro-batch-tokens 1", {"micro_batch_tokens": 1}),
        ("--memory balanced", {"memory": "balanced"}),
        ("--memory thrift", {"memory": "thrift"}),
    ]
    shorter = [config.max_seq_length // 2**power for power in (1, 2, 3)]
    changes += [(f"--max-seq-length {length}", {"max_seq_length": length}) for length in shorter if length >= 64]
    flags: dict[str, str] = {}
    for flag, change in changes:
        if all(getattr(config, name) == value for name, value in change.items()):
            continue
        if "memory" in change and _ORDER.index(change["memory"]) <= _ORDER.index(config.memory):
            continue
        config = dataclasses.replace(config, **change)
        flags[flag.split()[0]] = flag
        yield " ".join(flags.values()), config


def build_parser() -> OneLineParser:
    """The flags `fit` has beside those of `train`."""
    parser = OneLineParser(
        prog=PROG,
        description="Predicted peak of MLX's memory in a training step, what it is made of, and whether it fits.",
        epilog="All flags of orpo-mlx train are taken as well.",
        allow_abbrev=False,
    )
    parser.add_argument("--memory", metavar="GIB", help="memory of the Mac (default: say which Macs it fits)")
    parser.add_argument(
        "--mode", metavar="MODE", choices=tuple(MODES), help=f"train's --memory: {', '.join(MODES)} (default: fast)"
    )
    parser.add_argument("--prompt-tokens", metavar="N", help="of the tokens of a pair's side (default: half of them)")
    return parser


def parse(argv: Sequence[str] | None) -> tuple[TrainingConfig, float | None, int | None]:
    """Settings, the Mac's memory in GiB, and the prompt's tokens.

    Raises:
        ConfigError: flags that cannot be used.
    """
    own, arguments = build_parser().parse_known_args(argv)
    config = resolve([*arguments, *(("--memory", own.mode) if own.mode else ())], PROG)
    memory = None if own.memory is None else _above_0("--memory", own.memory, float)
    prompt = None if own.prompt_tokens is None else int(_above_0("--prompt-tokens", own.prompt_tokens, int))
    if config.max_seq_length < 2 or (prompt is not None and prompt >= config.max_seq_length):
        raise ConfigError(
            f"--max-seq-length {config.max_seq_length}: leaves no token for the completion; give a larger one."
        )
    return config, memory, prompt


def _above_0(flag: str, text: str, kind: type[float] | type[int]) -> float:
    try:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
    except ValueError:
        words = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{flag}: found {text!r}, expected {words} greater than 0.") from None
    return value


def _run(argv: Sequence[str] | None) -> None:
    config, memory, prompt = parse(argv)
    blueprint = read_blueprint(config.model, dtype=config.dtype)
    print("A step is run on models of this shape with few layers; with a large model it takes a while.", flush=True)
    prediction = predicted(config, blueprint, prompt)
    print(f"{config.method}, {config.batch_size} pairs of {config.max_seq_length} tokens a side, predicted:")
    print(describe(prediction))
    print(verdict(prediction.peak, memory))
    if memory is None or prediction.peak <= recommended_working_set(memory):
        return
    for flags, changed in remedies(config):
        share = None if prompt is None else max(1, prompt * changed.max_seq_length // config.max_seq_length)
        peak = predicted(changed, blueprint, share).peak
        fits = peak <= recommended_working_set(memory)
        print(f"  with {flags}: {peak:.2f} GiB{', which fits' if fits else ''}")
        if fits:
            return
    print("No flag makes it fit: take a smaller model, or one quantised to 4 bits.")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: _run(argv))


if __name__ == "__main__":
    sys.exit(main())
