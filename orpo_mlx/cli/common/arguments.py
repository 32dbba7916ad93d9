"""Arguments that several commands have, and checks of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.sources import data_files
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


def check_output_file(flag: str, path: Path) -> Path:
    """The file to write: `path`, or what a link there leads to.

    Raises:
        ConfigError: it cannot be written; said before the work whose result goes there.
    """
    # A file is written beside its destination and renamed over it, which would put it in the place of the link.
    file = Path(os.path.realpath(path)) if path.is_symlink() else path
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"{flag} {path}: cannot be written there; give a file in a folder that exists.")
    # Renamed over /dev/null, the file would be what every other program finds there.
    if file.exists() and not file.is_file():
        raise ConfigError(f"{flag} {path}: is a device or pipe, expected a file; give another name.")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path}: this user may not write into {file.parent}; give a file in another folder.")
    return file


def check_apart(flag: str, output: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse an output that would take the place of what is read; raises ConfigError.

    `inputs` are files and folders by the flags that name them. A folder's files are those that data is read from.
    """
    for name, given in inputs.items():
        path = None if given is None else Path(given).expanduser()
        read = [] if path is None else data_files(path) if path.is_dir() else [path]
        if any(_is_same(output, each) for each in read):
            raise ConfigError(
                f"{flag} {output}: is what {name} names or has in it, and would be lost; give another file."
            )


def check_replaced(destination: Path, inputs: Mapping[str, str | None]) -> None:
    """Refuse to replace a file or folder that is, or has in it, what is read; raises ConfigError."""
    for name, given in inputs.items():
        if given is not None and destination.exists():
            path = Path(given).expanduser()
            if any(_is_same(destination, each) for each in (path, *path.resolve().parents)):
                raise ConfigError(
                    f"{destination}: is what {name} names or has it in it, and would be lost; give another destination."
                )
            if path.is_dir() and _is_part(destination, path):
                raise ConfigError(
                    f"{destination}: is one of the files of {name} {given}, and would be lost; give another one."
                )


def _is_part(file: Path, folder: Path) -> bool:
    """Whether a file is one that a folder's reader may want: any in it, by whatever name, but for a GGUF file, which
    is what an earlier conversion may have left there, and is a model of its own."""
    if not file.is_file() or not any(_is_same(file, each) for each in folder.iterdir() if each.is_file()):
        return False
    with file.open("rb") as opened:
        return opened.read(4) != b"GGUF"


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths are one file or folder, be it there or not."""
    # Two names of one file, links of either kind among them; `resolve` knows nothing of hard links and of case.
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def check_from_beginning(config: TrainingConfig) -> None:
    """Refuse settings that ask for something else than a training from its beginning; raises ConfigError."""
    for name in ("test", "dry_run", "resume"):
        if getattr(config, name):
            raise ConfigError(f"`{name}`: this command is about the steps of a new training; leave it out.")


def check_count(flag: str, value: int) -> None:
    """Refuse a number below 1; raises ConfigError."""
    if value < 1:
        raise ConfigError(f"{flag}: found {value}, expected a whole number above 0.")
