"""The command `orpo-mlx`: one name for every program of the package, each imported when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from orpo_mlx import __version__
from orpo_mlx.errors import ConfigError, did_you_mean

PROG = "orpo-mlx"


class Command(NamedTuple):
    """A program of the package."""

    module: str
    """Has `main(argv) -> int`, the exit status."""
    summary: str


COMMANDS = {
    "inspect": Command("orpo_mlx.cli.inspect", "look at preference pairs as training would take them"),
    "fit": Command("orpo_mlx.cli.fit", "predict the memory of a run, and whether it fits a Mac"),
    "train": Command("orpo_mlx.cli.train", "align a model with preference pairs"),
    "score": Command("orpo_mlx.cli.score", "log-probs of pairs under a model, a row each"),
    "evaluate": Command("orpo_mlx.cli.evaluate", "replies of two models compared by a judge"),
    "pairs": Command("orpo_mlx.cli.pairs", "samples of a model scored and made into pairs"),
    "iterate": Command("orpo_mlx.cli.iterate", "rounds of pairs, training and evaluation"),
    "watch": Command("orpo_mlx.cli.watch", "a page that draws a run as it goes on"),
    "report": Command("orpo_mlx.cli.report", "draw training runs as a page and a picture"),
    "chat": Command("orpo_mlx.cli.chat", "talk with a tuned model, with the base model beside it"),
    "doctor": Command("orpo_mlx.cli.doctor", "check and measure this package on this machine"),
    "push": Command("orpo_mlx.cli.push", "send adapters, model card and figures to the Hub"),
    "convert": Command("orpo_mlx.cli.convert", "checkpoints and adapters of every kind, in and out"),
    "compare": Command("orpo_mlx.cli.compare", "train methods side by side under one budget"),
    "memory": Command("orpo_mlx.cli.memory", "memory and seconds of a training step, method by method"),
}
"""Adding a command is a line here."""


def usage() -> str:
    """What `--help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND ...",
            "",
            "Preference alignment of language models in MLX.",
            "",
            *lines,
            "",
            f"{PROG} COMMAND --help has the flags of each; {PROG} --version prints the version.",
        ]
    )


def find_command(name: str) -> Command:
    """The command of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name in COMMANDS:
        return COMMANDS[name]
    raise ConfigError(f"no command {name!r}, expected one of {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status, that of the command given."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = arguments[0] if arguments else "--help"
    if asked not in COMMANDS:
        # Imported here, like every command, none of which is slowed down by it.
        from orpo_mlx.config.flags import exit_status

        texts = {"--help": usage, "-h": usage, "--version": lambda: f"{PROG} {__version__}"}
        return exit_status(PROG, lambda: print(texts[asked]()) if asked in texts else find_command(asked))
    program = importlib.import_module(find_command(arguments[0]).module)
    return int(program.main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
