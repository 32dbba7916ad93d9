"""`mx.compile` that traces and replays but fuses nothing.

On a CPU MLX makes each fused kernel with the system's C++ compiler, about a second each: minutes for what a Mac does in
milliseconds. Tests of the GPU's branches need the tracing, not the kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

# Of `CompileMode` in mlx/compile.h, which has no name in Python.
_NO_FUSE, _ENABLED = 2, 3


def fuse_nothing() -> None:
    """For the whole process, also where compiling is switched on again after it was off."""
    mx.enable_compile = fuse_nothing
    _set_mode(_NO_FUSE)


@contextmanager
def fusing() -> Iterator[None]:
    """Within the block, `mx.compile` fuses as it does elsewhere."""
    _set_mode(_ENABLED)
    try:
        yield
    finally:
        _set_mode(_NO_FUSE)


def _set_mode(mode: int) -> None:
    library = Path(mx.__file__).parent / "lib" / "libmlx.so"
    try:
        ctypes.CDLL(str(library))["_ZN3mlx4core16set_compile_modeENS0_11CompileModeE"](mode)
    except (AttributeError, OSError):
        # Another MLX: kernels are compiled.
        return
