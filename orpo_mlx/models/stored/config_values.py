"""Files and values of a model's folder that libraries would wait for, or take and not calculate with."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo_mlx.errors import ModelError
from orpo_mlx.text import quoted

_MOST_TOKENS = 2**31


def check_files(folder: Path) -> None:
    """Refuse a pipe, a socket or a device in a model's folder, which a reader would wait for; raises ModelError."""
    for file in sorted(folder.iterdir()):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ModelError(f"{file}: is no regular file, as the files of a model are; remove it.")


def check_ends(ends: Any, path: Path) -> None:
    """Refuse ends of replies, of config.json or generation_config.json, that are no token ids; raises ModelError."""
    for end in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if not isinstance(end, int) or not 0 <= end < _MOST_TOKENS:
            raise ModelError(f"{path}: eos_token_id: found {quoted(end)}, expected a token id; mend its config files.")


def check_text_numbers(config: Mapping[str, Any], args_class: Any, path: Path) -> None:
    """Refuse numbers that are text; raises ModelError.

    Args:
        config: of the model.
        args_class: mlx-lm's dataclass of the architecture, whose annotations say what is a number.
        path: of the model.
    """
    for name, hint in typing.get_type_hints(args_class).items():
        kinds = set(typing.get_args(hint) or (hint,))
        if isinstance(config.get(name), str) and kinds <= {int, float, type(None)}:
            raise ModelError(f"{path}: {name}: found {quoted(config[name])}, expected a number; mend its config.json.")
