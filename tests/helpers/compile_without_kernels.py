"""`mx.compile` that traces and replays but fuses nothing.

On a CPU MLX makes each fused kernel with the system's C++ compiler, about a second each: minutes for what a Mac does in
milliseconds. Tests of the GPU's branches need the tracing, not the kernels.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import mlx.core as mx

_NO_FUSE = 2  # `CompileMode::no_fuse` in mlx/compile.h, which has no name in Python.


def fuse_nothing() -> None:
    """For the whole process; where the symbol is missing (another MLX), kernels are compiled."""
    library = Path(mx.__file__).parent / "lib" / "libmlx.so"
    if not library.is_file():
        return
    try:
        ctypes.CDLL(str(library))["_ZN3mlx4core16set_compile_modeENS0_11CompileModeE"](_NO_FUSE)
    except (AttributeError, OSError):
        return
