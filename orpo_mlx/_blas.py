"""Load a fast BLAS before MLX binds its own on Linux.

MLX's Linux CPU wheel is linked against a reference BLAS. Its symbols are resolved at load time, so an optimised
BLAS that is already in the process with global visibility is used instead (about 70 times faster float32 matrix
products). macOS has Accelerate and needs none of this.

`ORPO_MLX_BLAS=off` leaves everything alone; `ORPO_MLX_BLAS=/path/to/libblas.so` loads that library and no other.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from pathlib import Path

ENVIRONMENT_VARIABLE = "ORPO_MLX_BLAS"
_CANDIDATES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so.3", "libmkl_rt.so")
_REMEDY = (
    "install one with 'apt-get install libopenblas0-pthread' (or 'pip install mkl'), "
    f"or set {ENVIRONMENT_VARIABLE}=off to silence this"
)

logger = logging.getLogger("orpo_mlx")


def load_blas() -> str | None:
    """Load OpenBLAS or MKL into the process; the name loaded, or None where none was needed or found.

    Raises:
        OSError: `ORPO_MLX_BLAS` names a library that cannot be loaded.
    """
    choice = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not sys.platform.startswith("linux") or choice == "off":
        return None
    if "mlx.core" in sys.modules:
        logger.warning(
            "orpo_mlx: mlx was imported before orpo_mlx, so no fast BLAS could be loaded; "
            "import orpo_mlx first (or set %s=off to silence this).",
            ENVIRONMENT_VARIABLE,
        )
        return None
    if choice:
        try:
            ctypes.CDLL(choice, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise OSError(f"{ENVIRONMENT_VARIABLE}={choice} cannot be loaded ({error}); {_REMEDY}") from None
        return choice
    for name in _CANDIDATES:
        # `pip install mkl` puts its libraries into the environment's lib folder, off the loader's path.
        for path in (name, str(Path(sys.prefix) / "lib" / name)):
            try:
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return path
    logger.warning("orpo_mlx: no OpenBLAS or MKL found, so MLX runs some 60 times slower on this CPU; %s.", _REMEDY)
    return None
