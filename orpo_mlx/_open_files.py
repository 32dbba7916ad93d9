"""Let mlx-lm be imported where fewer files may be open than it asks for.

mlx-lm's import sets the limit of open files to 2,048, and the highest that may be asked for to 4,096. Where less is
allowed, as in many containers, that is an error before anything has been done; and where more is, it would be lowered.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

_SetLimit = Callable[[int, tuple[int, int]], None]


# What mlx-lm asks for; any other call is somebody else's, and means what it says.
_ASKED = (2048, 4096)


def allow_fewer_files() -> None:
    """Have `resource.setrlimit` ask for no more open files than this process may have, and never lower that."""
    if importlib.util.find_spec("resource") is None:
        return  # Windows.
    import resource

    if not hasattr(resource.setrlimit, "within"):
        # For all that call it by its module: which import of mlx-lm comes first cannot be known here.
        resource.setrlimit = bounded(resource.setrlimit, resource.getrlimit, resource.RLIMIT_NOFILE)


def bounded(set_limit: _SetLimit, get_limit: Callable[[int], tuple[int, int]], files: int) -> _SetLimit:
    """`set_limit`, but for mlx-lm's own call: that takes what is allowed where it asks for more, and lowers nothing."""

    def within(which: int, limits: tuple[int, int]) -> None:
        if which == files and limits == _ASKED:
            soft, hard = get_limit(files)
            # Infinity is -1: more than any number, and smaller than each.
            wanted = limits[0] if hard < 0 else min(limits[0], hard)
            limits = (soft if soft < 0 else max(wanted, soft), hard)
        set_limit(which, limits)

    marked: Any = within
    marked.within = True
    return within
