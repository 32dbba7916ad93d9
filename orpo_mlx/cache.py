"""Where this package keeps what can be made again: tokens and reference log-probs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """`$ORPO_MLX_CACHE` (None if "off": nothing is kept), or `orpo_mlx` in the user's cache folder.

    Not the adapter's folder: the next run usually has another one, and tokens and the reference are the same for all
    learning rates, β and methods tried on one model and data set.
    """
    given = os.environ.get("ORPO_MLX_CACHE")
    if given:
        return None if given == "off" else Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "orpo_mlx"
