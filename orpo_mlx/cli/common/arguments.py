"""Arguments that several commands have, and checks of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from orpo_mlx.errors import ConfigError
from orpo_mlx.models.names import LOAD_DTYPES


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that loads a model as it is."""
    parser.add_argument("--dtype", choices=LOAD_DTYPES, help="default: the checkpoint's, float32 on a CPU")
    add_trust_remote_code(parser)


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    """The flag without which a checkpoint's own code is never run."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the checkpoint"
    )


def check_output_file(flag: str, path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result goes there; raises ConfigError."""
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: cannot be written there; give a file in a folder that exists.")


def check_count(flag: str, value: int) -> None:
    """Refuse a number below 1; raises ConfigError."""
    if value < 1:
        raise ConfigError(f"{flag}: found {value}, expected a whole number above 0.")
