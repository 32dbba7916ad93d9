"""Load a fast BLAS before MLX binds its own on Linux.

MLX's Linux CPU wheel is linked against a reference BLAS. Its symbols are resolved at load time, so an optimised
BLAS that is already in the process with global visibility is used instead (about 70 times faster float32 matrix
products). macOS has Accelerate and needs none of this.

An OpenBLAS older than the CPU takes it for one without AVX and is six times slower for it (0.3.21 on a Xeon of 2024:
47 GFLOP/s float32 where it can 280); it is then loaded again with the kernels named that the CPU can run.

`ORPO_MLX_BLAS=off` leaves everything alone; `ORPO_MLX_BLAS=/path/to/libblas.so` loads that library and no other.
"""

from __future__ import annotations

import _ctypes
import ctypes
import logging
import os
import sys
from pathlib import Path

ENVIRONMENT_VARIABLE = "ORPO_MLX_BLAS"
_CANDIDATES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so.3", "libmkl_rt.so")
_KERNELS = (("SKYLAKEX", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}), ("HASWELL", {"avx2", "fma"}))
"""OpenBLAS's names for its kernels and the CPU flags they need, best first."""
_WITHOUT_AVX = {"prescott", "banias", "katmai", "core2", "penryn", "dunnington", "nehalem", "atom", "generic"}
_CORE_TYPE = "OPENBLAS_CORETYPE"
_CPU_INFO = Path("/proc/cpuinfo")
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
            _open(choice)
        except OSError as error:
            raise OSError(f"{ENVIRONMENT_VARIABLE}={choice} cannot be loaded ({error}); {_REMEDY}") from None
        return choice
    for name in _CANDIDATES:
        # `pip install mkl` puts its libraries into the environment's lib folder, off the loader's path.
        for path in (name, str(Path(sys.prefix) / "lib" / name)):
            try:
                _open(path)
            except OSError:
                continue
            return path
    logger.warning("orpo_mlx: no OpenBLAS or MKL found, so MLX runs some 60 times slower on this CPU; %s.", _REMEDY)
    return None


def _open(path: str) -> None:
    # Not with global visibility at first: its kernels may be the wrong ones, and MLX would bind to it.
    library = ctypes.CDLL(path)
    kernels = None if _CORE_TYPE in os.environ else better_kernels(_core_name(library), _cpu_flags())
    if kernels is None:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        return
    # OpenBLAS chooses its kernels once, when it is loaded.
    _ctypes.dlclose(library._handle)
    os.environ[_CORE_TYPE] = kernels
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    finally:
        del os.environ[_CORE_TYPE]


def better_kernels(chosen: str, flags: set[str]) -> str | None:
    """OpenBLAS's name of kernels to take instead of those it `chosen`; None where its choice is to stand."""
    if chosen.lower() not in _WITHOUT_AVX:
        return None
    return next((name for name, needed in _KERNELS if needed <= flags), None)


def _core_name(library: ctypes.CDLL) -> str:
    """What OpenBLAS takes the CPU for; empty for another library."""
    try:
        name = library.openblas_get_corename
    except AttributeError:
        return ""
    # ctypes takes a result for an int, which has no room for a pointer.
    name.restype = ctypes.c_char_p
    return bytes(name()).decode()


def _cpu_flags() -> set[str]:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), ()))
